// A page that is opened from disk may not start a Worker: its script then runs in a hidden frame, so that the search works without a server.
if (location.protocol === 'file:') {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement('iframe')
      frame.hidden = true
      document.body.appendChild(frame)
      this.window = frame.contentWindow
      this.ready = new Promise(done => { this.window.__ready = done })
      this.window.document.open()
      this.window.document.write('<script>postMessage = data => parent.postMessage(data, "*"); importScripts = () => {}<\/script>' +
                                 `<script src="${url}" onload="__ready()"><\/script>`)
      this.window.document.close()
      window.addEventListener('message', event => {
        if (event.source !== this.window) return
        const message = new MessageEvent('message', {data: event.data})
        this.dispatchEvent(message)
        if (this.onmessage) this.onmessage(message)
      })
    }
    postMessage(data) { this.ready.then(() => this.window.dispatchEvent(new MessageEvent('message', {data}))) }
    terminate() {}
  }
}
