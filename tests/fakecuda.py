"""A pretended CUDA device for machines without one: `with cuda(): ...`.

Python sees tensors on cuda:0, whose numbers are those of a CPU tensor. What a card refuses is refused here: tensors of two devices in
one operation, a generator of the CPU, numpy. Waits of the host for the device (`SYNC`), bytes that go to it (`COPIED`) and draws on the
CPU (`DRAWN`) are counted by file:line of the library. C++ sees tensors of the CPU, so that autograd works without a driver; nothing is
said of kernels, speed, compilation or several cards. `ARTEFACTS` lists what differs from a card and why."""
import collections, contextlib, functools, gc, sys, types
import accelerate
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

CUDA, CPU = torch.device('cuda:0'), torch.device('cpu')
SYNC, COPIED, DRAWN = (collections.Counter() for _ in range(3))
ARTEFACTS = {
    'circular padding': 'its C++ asks the wrapper for memory; done by concatenation here',
    'autocast': 'of the CPU: the wrapper is a CPU tensor to C++, so bfloat16 rounds as there',
    'accumulated gradients': 'C++ clones them by options that say CPU; put back on the device after each backward',
    'torch.cuda.is_available()': 'stays False: there is no driver; torch.accelerator says that there is one',
    'a net with a graph': 'cannot move while a result of it is alive that gradients flow through; a card does not mind',
    'scaled_dot_product_attention': 'always the plain form; a card chooses a kernel',
    'generators of the device': 'those of the CPU stand for them where a library asks torch for one'}


def at() -> str:
    "File:line of the library that is running, the innermost."
    f = sys._getframe(1)
    while f is not None:
        name = f.f_code.co_filename
        if '/vfmvae/' in name and '/site-packages/' not in name: return f'{name.rsplit("/", 1)[1]}:{f.f_lineno} {f.f_code.co_name}'
        f = f.f_back
    return '(outside)'


def is_cuda(device) -> bool:
    "Is this a name or an object of the pretended device?"
    return isinstance(device, str | torch.device) and torch.device(device).type == 'cuda'


def refuse(*_, **__):
    raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")


class CudaTensor(torch.Tensor):
    "On cuda:0 for Python; `_d` is the CPU tensor that holds the numbers."
    @staticmethod
    def __new__(cls, data, requires_grad=False):
        d = data.detach()
        assert not isinstance(d, CudaTensor)
        new = torch.Tensor._make_wrapper_subclass(cls, d.size(), strides=d.stride(), storage_offset=0, dtype=d.dtype, device='cpu',
                                                  requires_grad=requires_grad)
        new._d = d
        return new
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    numpy = __array__ = refuse
    def __repr__(self): return f'CudaTensor({self._d})'
    def tolist(self):
        SYNC[at()+' tolist'] += 1
        return self._d.tolist()
    def get_device(self): return 0
    def data_ptr(self): return self._d.data_ptr()
    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = new = CudaTensor(self._d.clone(), self.requires_grad)
            if getattr(self, '_is_param', False): new._is_param = True
        return memo[id(self)]
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.type_as): return move(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if func in (torch._C._nn.pad, torch.nn.functional.pad) and 'circular' in (*args[2:3], kwargs.get('mode')):
                x, p = args[:2]
                return torch.cat([x[..., x.shape[-1]-p[0]:], x, x[..., :p[1]]], -1)
            if func is torch.Tensor.new_tensor:
                return torch.tensor(args[1], dtype=kwargs.get('dtype') or args[0].dtype).to(kwargs.get('device', CUDA))
            return func(*args, **kwargs)
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return dispatch(func, args, kwargs or {})


# from one device to the other -------------------------------------------------------------------------------------------------------------------

class _ToCuda(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = x.dtype
        return CudaTensor(x.detach().to(dtype, copy=True))
    @staticmethod
    def backward(ctx, g): return plain(g).to(ctx.dtype), None


class _ToCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = x.dtype
        return x._d.to(dtype, copy=True)
    @staticmethod
    def backward(ctx, g): return CudaTensor(g.to(ctx.dtype)), None


def move(func, args, kwargs):
    "Tensor.to, .cpu, .cuda and .type_as."
    x, device, dtype, form = args[0], None, None, kwargs.get('memory_format')
    if func is torch.Tensor.cpu: device = CPU
    elif func is torch.Tensor.cuda: device = CUDA
    else:
        for r in (*args[1:], kwargs.get('device'), kwargs.get('dtype'), kwargs.get('other')):
            if isinstance(r, torch.Tensor): device, dtype = r.device, r.dtype
            elif isinstance(r, torch.dtype): dtype = r
            elif isinstance(r, str | torch.device): device = torch.device(r)
    device, dtype = device or x.device, dtype or x.dtype
    if device.type == 'meta': return plain(x).to(device, dtype)
    here, there = isinstance(x, CudaTensor), is_cuda(device)
    with torch._C.DisableTorchFunctionSubclass():
        if here == there:
            if dtype == x.dtype and not kwargs.get('copy') and form is None: return x
            return torch.Tensor.to(x, dtype=dtype, copy=bool(kwargs.get('copy')), **({} if form is None else dict(memory_format=form)))
        if there:
            COPIED[at()] += x.numel()*x.element_size()
            return _ToCuda.apply(x, dtype)
        SYNC[at()+' .cpu'] += 1
        return _ToCpu.apply(x, dtype)


# every operation of torch -------------------------------------------------------------------------------------------------------------------------

_MIXED = {f'aten::{n}' for n in ('_to_copy', 'copy_', 'copy', 'index', 'index_put_', 'index_put', '_index_put_impl_', '_foreach_copy_', 'set_', 'set_data')}
_WAITS = {f'aten::{n}' for n in ('nonzero', '_unique2', 'unique_dim', 'masked_select', 'bincount', 'equal', 'is_nonzero', 'unique_consecutive',
                                 'repeat_interleave')}
_DRAWS = {'aten::rand', 'aten::randn', 'aten::randint', 'aten::randperm'}


def plain(x): return x._d if isinstance(x, CudaTensor) else x


def wrap(x):
    if isinstance(x, torch.Tensor): return x if isinstance(x, CudaTensor) else CudaTensor(x)
    return type(x)(map(wrap, x)) if type(x) in (list, tuple) else x


def tensors(x) -> list:
    if isinstance(x, torch.Tensor): return [x]
    if isinstance(x, dict): x = x.values()
    return [t for y in x for t in tensors(y)] if isinstance(x, list | tuple | type({}.values())) else []


def check(name, args, kwargs, every):
    "Raises what a card raises."
    on = [t for t in every if isinstance(t, CudaTensor)]
    if on and name.startswith('mkldnn'): raise RuntimeError(f'{name} on a CUDA tensor')
    if on and name not in _MIXED:
        for t in every:
            if not isinstance(t, CudaTensor) and t.dim() > 0 and t.device.type != 'meta':
                raise RuntimeError('Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! '
                                   f'({name}, cpu tensor {tuple(t.shape)})')
    if name in ('aten::index', 'aten::index_put_', 'aten::index_put') and not isinstance(args[0], CudaTensor):
        if any(isinstance(i, CudaTensor) for i in tensors(args[1])):
            raise RuntimeError('indices should be either on cpu or on the same device as the indexed tensor (cpu)')
    if kwargs.get('generator') is not None and (is_cuda(kwargs.get('device')) or on):
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({name})")


def copied(func, args, kwargs):
    "aten::_to_copy."
    source, device = args[0], kwargs.get('device')
    how = {k: v for k, v in kwargs.items() if k not in ('device', 'non_blocking', 'pin_memory')}
    if device is not None and torch.device(device).type == 'meta': return func(plain(source), device=device, **how)
    to = isinstance(source, CudaTensor) if device is None or isinstance(source, CudaTensor) else is_cuda(device)
    if to and not isinstance(source, CudaTensor): COPIED[at()] += source.numel()*source.element_size()
    out = func(plain(source), **how)
    return CudaTensor(out) if to else out


def mutated(func, args, kwargs):
    "(whether an operation returns what it wrote into, that)."
    schema = func._schema
    if not schema.returns: return True, None
    given = {a.name: args[i] if i < len(args) else kwargs.get(a.name) for i, a in enumerate(schema.arguments)}
    alias = {s: given[a.name] for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write for s in a.alias_info.before_set}
    if not all(r.alias_info is not None and r.alias_info.is_write for r in schema.returns): return False, None
    out = [alias[next(iter(r.alias_info.before_set))] for r in schema.returns]
    return True, out[0] if len(out) == 1 else tuple(out)


def touches(args) -> bool:
    "Is one of the arguments, or of those in a list, on the card?"
    return any(type(a) is CudaTensor or type(a) in (list, tuple) and any(type(b) is CudaTensor for b in a) for a in args)


def dispatch(func, args, kwargs):
    name, device = func._schema.name, kwargs.get('device')
    on = touches(args) or bool(kwargs) and touches(kwargs.values())
    if not on and (device is None or not is_cuda(device)):
        if name in _DRAWS: DRAWN[at()] += 1
        return func(*args, **kwargs)
    check(name, args, kwargs, tensors((args, kwargs)))
    if name == 'aten::_local_scalar_dense' and on:
        SYNC[at()+' item/bool'] += 1
        return args[0]._d.item()
    if name in _WAITS and on: SYNC[f'{at()} {name}'] += 1
    if name == 'aten::_to_copy': return copied(func, args, kwargs)
    if name == 'aten::copy_':
        a, b = args[:2]
        if isinstance(a, CudaTensor) and not isinstance(b, CudaTensor): COPIED[at()+' copy_'] += b.numel()*b.element_size()
        if not isinstance(a, CudaTensor) and isinstance(b, CudaTensor): SYNC[at()+' copy_ to cpu'] += 1
        func(plain(a), plain(b), *args[2:])
        return a
    if name == 'aten::_fused_sdp_choice': return 0
    to = is_cuda(device) if device is not None else on
    if device is not None and to: kwargs = {k: v for k, v in kwargs.items() if k != 'pin_memory'} | dict(device=CPU)
    out = func(*tree_map(plain, args), **tree_map(plain, kwargs))
    if func._schema.is_mutable:
        done, written = mutated(func, args, kwargs)
        if done: return written
    return wrap(out) if to else out


class _Mode(TorchDispatchMode):
    _mode_key = torch._C._TorchDispatchModeKey.FAKE      # below autograd, as a device is
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return dispatch(func, args, kwargs or {})


# what a program asks of torch and of Accelerate ---------------------------------------------------------------------------------------------------

class _Autocast(torch.autocast):
    def __init__(self, device_type, *a, **k): super().__init__('cpu' if device_type == 'cuda' else device_type, *a, **k)


def _made(make, data, *, device=None, **how):
    "torch.tensor and torch.as_tensor, whose C++ asks for a driver before it asks a mode."
    return make(data, **how).to(device) if is_cuda(device) else make(data, device=device, **how)


class Accelerator:
    "One of the CPU that says it is on cuda:0."
    device = CUDA
    def __init__(self, own): self._own = own
    def __getattr__(self, name): return getattr(self._own, name)
    def reduce(self, t, reduction='mean'): return t
    def backward(self, loss, **how):
        loss.backward(**how)
        for p in gc.get_objects():       # see ARTEFACTS
            if type(p) is CudaTensor and p.is_leaf and p.grad is not None and not isinstance(p.grad, CudaTensor): p.grad = CudaTensor(p.grad)


@contextlib.contextmanager
def cuda():
    "There is a card, cuda:0, and torch, Accelerate and the library take it for the best device."
    saved: list[tuple] = []
    def patch(owner, name, value):
        saved.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)
    own = lambda device: 'cpu' if device == 'cuda' else device
    enabled, dtype, swaps = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)      # a parameter becomes another object on its way to the device
    patch(torch, 'autocast', _Autocast)
    patch(torch, 'is_autocast_enabled', lambda device='cuda': enabled(own(device)))
    patch(torch, 'get_autocast_dtype', lambda device: dtype(own(device)))
    patch(torch.cuda, 'synchronize', lambda *_: None)
    patch(torch.accelerator, 'is_available', lambda: True)
    patch(torch.accelerator, 'current_accelerator', lambda *_, **__: CUDA)
    patch(torch.accelerator, 'current_stream', lambda *_: types.SimpleNamespace(is_capturing=lambda: False))
    patch(torch.accelerator, 'set_device_index', lambda *_: None)
    patch(torch.nn.Module, 'cuda', lambda self, *_: self.to(CUDA))
    patch(torch.Tensor, 'cuda', lambda self, *_, **__: move(torch.Tensor.to, (self, CUDA), {}))
    for make in (torch.tensor, torch.as_tensor): patch(torch, make.__name__, functools.partial(_made, make))
    real, first = accelerate.Accelerator, []
    def accelerator(cpu=False, **how):
        first.append(cpu)                # Accelerate's state is the process's: the first call decides
        own = real(cpu=True, **how)
        return own if first[0] else Accelerator(own)
    patch(accelerate, 'Accelerator', accelerator)
    try:
        with _Mode(): yield
    finally:
        for owner, name, value in reversed(saved): setattr(owner, name, value)
        torch.__future__.set_swap_module_params_on_conversion(swaps)


def clear() -> None:
    "Counts from zero."
    for c in (SYNC, COPIED, DRAWN): c.clear()
