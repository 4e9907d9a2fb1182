"""Inputs as they lie on people's disks, spoiled in every way that we could think of: each ends in one clear line or in the right result.

`python tests/fuzz.py` runs what `make test` runs; `--count 10000 --seed 3` more of it, `--kind shards --index 17` one case, with its traceback.
Cases run in forked children, so that what crashes, hangs or eats memory is one case's fault and ends no other.
"""
import argparse, collections, contextlib, io, json, os, random, resource, select, shutil, signal, sys, tempfile, time, traceback
from pathlib import Path
from typing import Any

from scope import ALL

os.environ.setdefault('OMP_NUM_THREADS', '1')

SECONDS, SECONDS_ALONE, BYTES = 10, 30, 2*1024**3       # a case may take so long (if it takes longer: once more, alone), and so much memory
SEED, COUNT = int(os.environ.get('VFMVAE_FUZZ_SEED') or 15), int(os.environ.get('VFMVAE_FUZZ_COUNT') or (1560 if ALL else 520))
SHARES = dict(images=12, shards=12, configs=20, settings=6, tensors=10, pickles=9, published=10, banks=6, caches=10,
              statistics=6, cli=11)
GOOD = ('line', 'right')
PATH = os.environ.get('PATH', '')


class TooSlow(BaseException):
    "Past the time of a case; no `except Exception` holds it back."


# a folder and what happens outside what may be written --------------------------------------------------------------------------------------------

def listing(box: Path, but: tuple = ()) -> dict[str, tuple]:
    "Everything below a folder, without what may be written."
    found: dict[str, tuple] = {}
    skip = {str(b) for b in but}
    def walk(d: str) -> None:
        for e in os.scandir(d):
            if e.path in skip or any(e.path.startswith(s+os.sep) or s.endswith('*') and e.path.startswith(s[:-1])
                                     for s in skip):
                continue
            s = e.stat(follow_symlinks=False)
            folder = e.is_dir(follow_symlinks=False)
            found[e.path] = (s.st_mode, 0 if folder else s.st_size, 0 if folder else s.st_mtime_ns, s.st_ino)
            if folder: walk(e.path)
    walk(str(box))
    return found


def peak() -> int:
    "Bytes of memory at the highest since `reset_peak`."
    try:
        return next(int(line.split()[1])*1024 for line in Path('/proc/self/status').read_text().splitlines()
                    if line.startswith('VmHWM'))
    except (OSError, StopIteration): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024


def reset_peak() -> None:
    with contextlib.suppress(OSError): Path('/proc/self/clear_refs').write_text('5')


EXECUTED: list[str] = []     # programs that a case started,
TOUCHED: set[str] = set()    # ... and what it wrote to beyond its box
BOX: list[str] = []          # empty while no case runs
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

def _audit(event: str, args: tuple) -> None:
    "Hears of programs that are started (git says the commit of a checkout, and some cases run the command as a process), and of writing."
    if not BOX: return
    if event in ('subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn', 'pty.spawn'):
        words = [*args[1]] if event == 'subprocess.Popen' else []
        if not (words[:1] == ['git'] or words[:2] == [sys.executable, '-c']): EXECUTED.append(f'{event} {str(args[0])[:80]}')
    elif event == 'open' and isinstance(args[2], int) and args[2] & WRITES or event in ('os.mkdir', 'os.rename', 'os.remove', 'os.link', 'os.symlink'):
        for p in args[:2 if event in ('os.rename', 'os.link', 'os.symlink') else 1]:
            if isinstance(p, str | bytes | os.PathLike):
                at = os.path.abspath(os.fsdecode(p))
                if not at.startswith((BOX[0], '/dev/', '/proc/')) and '__pycache__' not in at: TOUCHED.add(at)


# one case -----------------------------------------------------------------------------------------------------------------------------------------

def complaint(text: str, names: tuple) -> str:
    "What is wrong with a refusal; '' if it is one clear line that names what it is about."
    bare = text.strip()
    if '\n' in bare or '\r' in bare: return 'more than one line'
    if not bare: return 'an empty message'
    if len(bare) > 1000: return f'{len(bare)} characters'
    if not any(c.isspace() for c in bare): return 'one word'
    if 'Traceback' in bare: return 'a traceback'
    if names and not any(str(n) in bare for n in names): return f'names none of {[str(n) for n in names][:4]}'
    return ''


def judge(case: Any, alarm: float) -> tuple[str, str, str]:
    "(verdict, text, traceback) of one case."
    from vfmvae.core import UserError
    signal.setitimer(signal.ITIMER_REAL, alarm)
    try: result = case.run()
    except UserError as e:
        signal.setitimer(signal.ITIMER_REAL, 0)
        said = str(e)
        if case.control: return 'control refused', said, traceback.format_exc()
        bad = complaint(said, case.names)
        return ('unclear', f'{bad}: {said[:300]!r}', '') if bad else ('line', said, '')
    except TooSlow: return 'hang', f'more than {alarm} s', ''
    except MemoryError as e: return 'memory', f'MemoryError {e}', traceback.format_exc()
    except BaseException as e:
        text = f'{type(e).__name__}: {e}'
        at = [f for f in traceback.extract_tb(e.__traceback__) if '/vfmvae/' in f.filename]
        return 'traceback', f"{text[:200]!r}{f' in {Path(at[-1].filename).stem}.{at[-1].name}' if at else ''}", traceback.format_exc()
    finally: signal.setitimer(signal.ITIMER_REAL, 0)
    if case.right is None: return 'silent', f'gave {str(result)[:200]!r}', ''
    try: ok = case.right(result)
    except UserError as e: return 'wrong', f'its result was refused: {e}', traceback.format_exc()
    except BaseException as e: return 'wrong', f'{type(e).__name__}: {e}'[:300], traceback.format_exc()
    return ('right', '', '') if ok or ok is None else ('wrong', f'gave {str(result)[:300]!r}', '')


def one(kind: str, seed: int, index: int, root: Path, alarm: float = SECONDS) -> dict:
    "Builds, runs and judges one case."
    from fuzz_tools import KINDS
    import torch, warnings
    random.seed(0)
    torch.manual_seed(0)
    rng = random.Random(f'{seed}/{kind}/{index}')
    box = root/f'{kind}-{index}'
    for d in ('in', 'cwd', 'home', 'bin', 'tmp'): (box/d).mkdir(parents=True)
    gs = box/'bin'/'gs'
    gs.write_text(f'#!/bin/sh\ntouch {box}/EXECUTED\nexit 1\n')
    gs.chmod(0o755)
    os.environ.update(VFMVAE_HOME=str(box/'home'), PATH=f"{box/'bin'}:{PATH}", TMPDIR=str(box/'tmp'))
    tempfile.tempdir = str(box/'tmp')
    os.chdir(box/'cwd')
    makers = KINDS[kind]
    maker = makers[index % len(makers)]
    said = dict(kind=kind, seed=seed, index=index, what=maker.__name__, detail='')
    began = time.time()
    try: case = maker(rng, box/'in')
    except BaseException as e:
        return dict(said, verdict='broken', text=f'the case could not be made: {type(e).__name__}: {e}'[:300],
                    trace=traceback.format_exc(), seconds=0, bytes=0)
    said |= dict(what=f'{maker.__name__}: {case.what}', detail=case.detail)
    out = (box/'home', box/'tmp', *case.out)
    before = listing(box, out)
    EXECUTED.clear()
    TOUCHED.clear()
    reset_peak()
    BOX.append(str(box))
    caught, err = io.StringIO(), io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(caught), contextlib.redirect_stderr(err):
        warnings.simplefilter('ignore')
        try: verdict, text, trace = judge(case, max(alarm, case.seconds))
        except TooSlow: verdict, text, trace = 'hang', f'more than {alarm} s', ''     # rung while C code ran, heard behind it
    BOX.clear()
    used = peak()
    after = listing(box, out)
    changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    changed += sorted(p for p in TOUCHED if os.path.lexists(p) and os.stat(p, follow_symlinks=False).st_mtime >= began-1)
    if EXECUTED or (box/'EXECUTED').exists():
        verdict, text = 'executed', f"{'; '.join(EXECUTED)} {'gs or the canary' if (box/'EXECUTED').exists() else ''}; {text}"
    elif changed: verdict, text = 'outside', f"{', '.join(os.path.relpath(p, box) for p in changed[:4])}; {text}"
    elif used > BYTES: verdict, text = 'memory', f'{used/1e9:.1f} GB; {verdict}; {text}'
    os.chdir('/')
    shutil.rmtree(box, ignore_errors=True)
    return dict(said, verdict=verdict, text=text.replace(str(box)+'/', ''), trace=trace,
                seconds=round(time.time()-began, 3), bytes=used)


# many cases in children ---------------------------------------------------------------------------------------------------------------------------

def _child(todo: list, seed: int, root: Path, pipe: int, alarm: float) -> None:
    "Runs cases and writes a line for each into the pipe; never returns."
    import torch
    code = 1
    try:
        torch.set_num_threads(1)
        sys.addaudithook(_audit)
        def late(*_: Any) -> None: raise TooSlow
        signal.signal(signal.SIGALRM, late)
        now = int(next(line.split()[1] for line in Path('/proc/self/status').read_text().splitlines()
                       if line.startswith('VmSize')))*1024
        resource.setrlimit(resource.RLIMIT_AS, (now+3*1024**3, now+3*1024**3))
        with os.fdopen(pipe, 'w', encoding='utf-8') as f:
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2): os.dup2(null, fd)
            for kind, index in todo:
                f.write(json.dumps(dict(begun=[kind, index]))+'\n')
                f.flush()
                f.write(json.dumps(one(kind, seed, index, root, alarm), default=str)+'\n')
                f.flush()
        code = 0
    finally: os._exit(code)


class Worker:
    "A child with cases to run, and what it said."
    def __init__(self, todo: list, seed: int, root: Path, alarm: float = SECONDS):
        self.todo, self.seed, self.alarm, self.held, self.begun, self.since = todo, seed, alarm, b'', None, time.time()
        read, write = os.pipe()
        sys.stdout.flush(); sys.stderr.flush()
        self.root = Path(tempfile.mkdtemp(dir=root))
        self.pid = os.fork()
        if not self.pid:
            os.close(read)
            _child(todo, seed, self.root, write, alarm)
        os.close(write)
        self.fd = read
    def read(self) -> tuple[list[dict], bool]:
        "(what is new, is it at its end)."
        b = os.read(self.fd, 1 << 16)
        *lines, self.held = (self.held+b).split(b'\n')
        rows = []
        for line in map(json.loads, lines):
            if 'begun' in line: self.begun, self.since = tuple(line['begun']), time.time()
            else:
                rows.append(line)
                self.begun = None
        return rows, not b
    def stop(self, verdict: str, text: str) -> dict | None:
        "Ends the child; the row of the case in which it was."
        with contextlib.suppress(ProcessLookupError): os.kill(self.pid, signal.SIGKILL)
        os.close(self.fd)
        _, status = os.waitpid(self.pid, 0)
        shutil.rmtree(self.root, ignore_errors=True)
        if self.begun is None: return None
        kind, index = self.begun
        if verdict == 'crash': text = f'the process ended with status {os.waitstatus_to_exitcode(status)}'
        return dict(kind=kind, seed=self.seed, index=index, what='', detail='', verdict=verdict, text=text, trace='',
                    seconds=time.time()-self.since, bytes=0)


def run(todo: list, seed: int, jobs: int = 2, batch: int = 40, each: Any = None) -> list[dict]:
    "All cases, in `jobs` children at a time; rows in any order."
    import fuzz_cases  # noqa: F401  (torch and the library, once for all children)
    root = Path(tempfile.mkdtemp(prefix='vfmvae-fuzz-'))
    queue = collections.deque([(todo[i:i+batch], SECONDS) for i in range(0, len(todo), batch)])
    workers: list[Worker] = []
    rows: list[dict] = []
    late: set[tuple] = set()
    def keep(r: dict) -> None:
        key = r['kind'], r['index']
        if r['verdict'] == 'hang' and key not in late:          # once more, alone: the machine may be busy
            late.add(key)
            queue.append(([key], SECONDS_ALONE))
            return
        rows.append(r)
        if each: each(r)
    try:
        while queue or workers:
            while queue and len(workers) < jobs: workers.append(Worker(queue[0][0], seed, root, queue.popleft()[1]))
            ready, _, _ = select.select([w.fd for w in workers], [], [], 1.)
            for w in list(workers):
                verdict = ''
                if w.fd in ready:
                    new, ended = w.read()
                    for r in new: keep(r)
                    if ended: verdict = 'crash'
                if not verdict and time.time()-w.since > max(w.alarm, 2*SECONDS_ALONE)+5: verdict = 'hang'
                if not verdict: continue
                left = w.todo[w.todo.index(w.begun)+1:] if w.begun else []
                workers.remove(w)
                lost = w.stop(verdict, f'more than {w.alarm} s, and no Python code ran in which to say so')
                if lost: keep(lost)
                if left: queue.appendleft((left, w.alarm))
    finally:
        for w in workers: w.stop('stopped', '')
        shutil.rmtree(root, ignore_errors=True)
    return rows


def plan(count: int, kinds: Any = None) -> list[tuple[str, int]]:
    "(kind, index) of so many cases, in the shares of the kinds."
    kinds = kinds or list(SHARES)
    whole = sum(SHARES[k] for k in kinds)
    return [(k, i) for k in kinds for i in range(-(-count*SHARES[k]//whole))]


def again(r: dict) -> str: return f"python tests/fuzz.py --kind {r['kind']} --seed {r['seed']} --index {r['index']}"


def table(rows: list[dict]) -> str:
    "Verdicts by kind."
    verdicts = [*GOOD, *sorted({r['verdict'] for r in rows} - {*GOOD})]
    count = collections.Counter((r['kind'], r['verdict']) for r in rows)
    lines = [['kind', 'cases', *verdicts]]
    for k in [*dict.fromkeys(r['kind'] for r in rows)]:
        lines.append([k, str(sum(r['kind'] == k for r in rows)), *(str(count[k, v]) for v in verdicts)])
    lines.append(['all', str(len(rows)), *(str(sum(r['verdict'] == v for r in rows)) for v in verdicts)])
    wide = [max(map(len, c)) for c in zip(*lines, strict=True)]
    return '\n'.join('  '.join(c.rjust(w) for c, w in zip(line, wide, strict=True)) for line in lines)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--seed', type=int, default=SEED)
    p.add_argument('--count', type=int, default=COUNT)
    p.add_argument('--kind', action='append', choices=list(SHARES))
    p.add_argument('--index', type=int, help='one case, with its traceback')
    p.add_argument('--jobs', type=int, default=2)
    p.add_argument('--json', help='file to which a line is appended for each case')
    p.add_argument('--quiet', action='store_true')
    a = p.parse_args()
    began = time.time()
    todo = plan(a.count, a.kind) if a.index is None else [(a.kind[0], a.index)]
    def each(r: dict) -> None:
        if a.json:
            with open(a.json, 'a', encoding='utf-8') as f: f.write(json.dumps(r)+'\n')
        if a.index is not None:
            print(r['trace'], json.dumps({k: v for k, v in r.items() if k != 'trace'}, indent=1), sep='\n')
        elif r['verdict'] not in GOOD and not a.quiet:
            print(f"{r['verdict']}: {r['kind']} {r['what']} {r.get('detail', '')}: {r['text']}\n    {again(r)}",
                  flush=True)
    rows = run(todo, a.seed, a.jobs, each=each)
    bad = [r for r in rows if r['verdict'] not in GOOD]
    if a.index is None:
        print(f'{table(rows)}\n{len(rows)} cases, {len(bad)} faults, seed {a.seed}, {time.time()-began:.0f} s')
    return 1 if bad else 0


if __name__ == '__main__': sys.exit(main())
