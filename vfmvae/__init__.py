"""Vision foundation models as image tokenizers for latent diffusion. The names of everyday work, and every module, are
imported when they are first asked for: `import vfmvae` itself imports neither torch nor numpy."""
__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

# name -> the module that has it
_MODULES = dict(
    VFM='vfm', World='world', folder='folders', shards='folders', open_data='recipes', open_tokenizer='tokenizer',
    tokenizers='tokenizer', reconstruct='tokenizer', train_tokenizer='recipes', train_flow='generation',
    generate='generation', evaluate_tokenizer='recipes', rfid='evaluate', gfid='evaluate', cknna='align',
    se_cknna='align', prepare='neighbours', extract='features', show_images='plots', Explorer='explorer',
    PRESETS='presets', study='studies')
__all__ = list(_MODULES)

if TYPE_CHECKING:      # for editors and type checkers; `a as a` says that it is given on
    from .align import cknna as cknna, se_cknna as se_cknna
    from .evaluate import gfid as gfid, rfid as rfid
    from .explorer import Explorer as Explorer
    from .features import extract as extract
    from .folders import folder as folder, shards as shards
    from .generation import generate as generate, train_flow as train_flow
    from .neighbours import prepare as prepare
    from .plots import show_images as show_images
    from .presets import PRESETS as PRESETS
    from .recipes import (evaluate_tokenizer as evaluate_tokenizer, open_data as open_data,
                          train_tokenizer as train_tokenizer)
    from .studies import study as study
    from .tokenizer import open_tokenizer as open_tokenizer, reconstruct as reconstruct, tokenizers as tokenizers
    from .vfm import VFM as VFM
    from .world import World as World


def __getattr__(name: str) -> Any:
    from importlib import import_module, util
    if name in _MODULES:
        globals()[name] = value = getattr(import_module(f'vfmvae.{_MODULES[name]}'), name)
        return value
    if not name.startswith('_') and util.find_spec(f'vfmvae.{name}'): return import_module(f'vfmvae.{name}')
    from difflib import get_close_matches
    near = ', '.join(get_close_matches(name, __all__, 3, .6))
    raise AttributeError(f"module 'vfmvae' has no {name!r}{'; nearest: '*bool(near)}{near}")


def __dir__() -> list[str]: return sorted({*globals(), *__all__})
