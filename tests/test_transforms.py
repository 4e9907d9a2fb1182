"What transforms take and draw: pictures alone, and any seed."
import numpy as np
import pytest
import torch

from vfmvae.core import UserError
from vfmvae.images import published_draw, published_noise, to_pil, to_uint8, transform, TRANSFORMS
from vfmvae.plots import show_images
from vfmvae.vfm import VFM
from vfmvae.views import apply_view, extract_views

X = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))*2-1
BYTES = to_uint8(X)
DOORS = dict({k: lambda x, k=k, t=t: transform(x, k, t.grid[0]) for k, t in TRANSFORMS.items()}, to_uint8=to_uint8, to_pil=lambda x: to_pil(x[0]),
             show_images=show_images, noise_of_views=lambda x: apply_view(x, ('noise', .1), range(2)), mixed=lambda x: apply_view(x, ('mixed', 1.), range(2)))


@pytest.mark.parametrize('door', DOORS)
@pytest.mark.parametrize('form', [BYTES, BYTES.long(), BYTES.short()], ids=lambda x: str(x.dtype))
def test_bytes_are_not_taken_for_numbers_from_minus_one_to_one(door, form):
    "They came back as pictures that are white, or hold 1 and 0."
    DOORS[door](X)
    with pytest.raises(UserError, match='integers'): DOORS[door](form)


@pytest.mark.parametrize('spoil', [lambda x: x*np.nan, lambda x: (x+1)*127.5, lambda x: x[0], lambda x: x[:0], lambda x: x.numpy()])
def test_a_transform_says_what_is_no_picture(spoil):
    for k, t in TRANSFORMS.items():
        with pytest.raises(UserError): transform(spoil(X), k, t.grid[0])


@pytest.mark.parametrize('name', TRANSFORMS)
def test_the_strength_that_changes_nothing_changes_no_bit(name):
    assert torch.equal(transform(X, name, TRANSFORMS[name].identity), X)


@pytest.mark.parametrize('seed', [-50, 2**32-1, 2**40, -2**62])
def test_the_published_draws_take_any_seed(seed):
    a = np.zeros((8, 8, 3), np.uint8)+128
    assert np.array_equal(published_noise(a, .1, 3, seed), published_noise(a, .1, 3, seed % 2**32))
    assert published_draw(3, seed) == published_draw(3, seed % 2**32)
    found = extract_views({'tiny': (VFM('tiny'), [-1])}, X.repeat(1, 1, 4, 4), [('noise', .1), 'mixed'], seed=seed, quiet=True)
    assert all(b.features.isfinite().all() for b in found.values())
