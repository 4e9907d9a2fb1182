"Laws of the adversarial losses and discriminators; none needs data from elsewhere."
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vfmvae.discriminators import (BatchNormLocal, blur, diff_augment, feature_matching, gan_loss_d, gan_loss_g,
                                   PatchGAN, ProjectedDiscriminator, SpectralConv, TokenHead)
from vfmvae.core import UserError
from vfmvae.files import load_weights, save_weights
from vfmvae.losses import resize
from vfmvae.vfm import tiny_vit, VFM

KINDS = 'hinge', 'mse', 'bce'
POLICY = 'color,translation,cutout'
check = torch.autograd.gradcheck


def rand(*s, seed=0, dtype=torch.float64): return torch.randn(*s, generator=torch.Generator().manual_seed(seed), dtype=dtype)
def image(b=4, h=64, w=None, seed=0): return torch.rand(b, 3, h, w or h, generator=torch.Generator().manual_seed(seed))*2-1


@pytest.fixture(scope='module')
def vfm(): return VFM('tiny')


@pytest.fixture
def D(vfm):
    torch.manual_seed(0)
    return ProjectedDiscriminator(vfm)


# losses ------------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', KINDS)
def test_gradients_of_the_losses(kind):
    r, f = (rand(3, 7, seed=i).requires_grad_() for i in (0, 1))
    assert min((r-1).abs().min(), (f+1).abs().min()) > 1e-4  # away from the hinge's kinks
    assert check(lambda r, f: (*gan_loss_d(r, f, kind), gan_loss_g(f, kind)), (r, f))
    assert check(lambda a, b: gan_loss_g([a, b], kind), (r, f[:, :2].detach().requires_grad_()))


@pytest.mark.parametrize('kind', KINDS)
def test_losses_pull_in_the_right_direction(kind):
    r, f = rand(50).requires_grad_(), rand(50, seed=1).requires_grad_()
    d_real, d_fake = gan_loss_d(r, f, kind)
    slope = torch.autograd.grad(d_real, r)[0], torch.autograd.grad(d_fake, f)[0], torch.autograd.grad(gan_loss_g(f, kind), f)[0]
    inside = (r.abs() < 1) & (f.abs() < 1)
    assert (slope[0][inside] < 0).all() and (slope[1][inside & (f > 0)] > 0).all() and (slope[2][inside] < 0).all()


def test_scales_are_averaged_with_equal_weight_whatever_their_size():
    a, b = rand(2, 1, 9, 9), rand(2, 1, 3, 3, seed=1)
    for kind in KINDS:
        want = [(x+y)/2 for x, y in zip(gan_loss_d(a, a, kind), gan_loss_d(b, b, kind), strict=True)]
        torch.testing.assert_close(list(gan_loss_d([a, b], [[rand(1), a], [b]], kind)), want)


def test_losses_in_half_precision_are_float32():
    x = rand(64, dtype=torch.float32).bfloat16()
    with torch.autocast('cpu', torch.bfloat16):
        for kind in KINDS: assert all(v.dtype == torch.float32 for v in (*gan_loss_d(x, x, kind), gan_loss_g(x, kind)))
        assert feature_matching([[x, x]], [[x+1, x]]).dtype == torch.float32
    assert gan_loss_g(x.float()) == gan_loss_g(x)


@pytest.mark.parametrize('layers', (2, 3, 5))
def test_feature_matching(layers):
    fake, real = ([[rand(2, 3, 4, seed=9*s+j+k) for j in range(layers)] for s in range(3)] for k in (0, 100))
    want = sum(4/(layers-1)/3*(f-r).abs().mean() for a, b in zip(fake, real, strict=True) for f, r in zip(a[:-1], b[:-1], strict=True))
    torch.testing.assert_close(feature_matching(fake, real), want)
    ends = fake[0][0].requires_grad_(), real[0][0].requires_grad_()
    feature_matching(fake, real).backward()
    assert ends[0].grad.abs().min() > 0 and ends[1].grad is None
    assert check(lambda x: feature_matching([[x, x]], [[rand(2, 3, seed=5)]*2]), rand(2, 3).requires_grad_())


def test_bad_losses_are_refused():
    x = rand(3)
    for bad, say in ((lambda: gan_loss_d(x, x, 'hing'), 'nearest: hinge'), (lambda: gan_loss_g(x, 'wgan'), 'known: hinge, mse, bce'),
                     (lambda: gan_loss_g([]), 'empty'), (lambda: feature_matching([[x, x]], [[x, x]]*2), 'same scales'),
                     (lambda: feature_matching([[x]], [[x]]), 'same scales'),
                     (lambda: feature_matching([[x, x]], [[x[:2], x]]), 'shapes')):
        with pytest.raises(UserError, match=say) as e: bad()
        assert '\n' not in str(e.value)


# augmentation and blur -----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('policy', (*POLICY.split(','), POLICY, 'cutout, color', ''))
def test_augmentation_is_differentiable_and_repeats_under_a_seed(policy):
    g = lambda: torch.Generator().manual_seed(3)
    assert check(lambda x: diff_augment(x, policy, g()), rand(2, 3, 8, 12).requires_grad_())
    torch.manual_seed(3)
    assert torch.equal(diff_augment(image(), policy), diff_augment(image(), policy, g()))
    assert torch.equal(diff_augment(image(), policy), image()) == (policy == '')


def test_translation_moves_each_image_by_whole_pixels_and_fills_with_zeros():
    x = image(64, 16, 24)+2
    y = diff_augment(x, 'translation', torch.Generator().manual_seed(0))
    shifts = set()
    for a, b in zip(x, y, strict=True):
        rows, cols = (b.amax((0, 2)) > 0).nonzero().flatten(), (b.amax((0, 1)) > 0).nonzero().flatten()
        found = [(i, j) for i in range(-2, 3) for j in range(-3, 4)
                 if torch.equal(b[:, rows[:, None], cols], a[:, (rows+i).clamp(0, 15)[:, None], (cols+j).clamp(0, 23)])]
        assert len(found) == 1 and len(rows) == 16-abs(found[0][0]) and len(cols) == 24-abs(found[0][1])
        shifts |= set(found)
    assert {i for i, _ in shifts} == set(range(-2, 3)) and {j for _, j in shifts} == set(range(-3, 4))


@pytest.mark.parametrize('side', (20, 23, 64))
def test_cutout_is_one_square_wherever_it_fits(side):
    c = int(.2*side+.5)
    hole = diff_augment(torch.ones(400, 1, side, side), 'cutout')[:, 0] == 0
    rows, cols = hole.any(2).sum(1), hole.any(1).sum(1)
    assert torch.equal(hole.sum((1, 2)), rows*cols) and rows.max() == cols.max() == c   # a full rectangle, at most c on a side
    assert c//2 <= rows.min() <= (c+1)//2 and hole.any(0).all()                         # cut in half at the rim, and no pixel is safe


def test_color_changes_what_it_says():
    x = image(200, 8)
    y = diff_augment(x, 'color', torch.Generator().manual_seed(0))
    shift = (y-x).mean((1, 2, 3))  # saturation and contrast turn about means: only brightness moves the mean
    assert -.5 <= shift.min() < -.45 and .45 < shift.max() <= .5
    grey = x.mean(1, keepdim=True)
    y = diff_augment(grey.expand(-1, 3, -1, -1), 'color', torch.Generator().manual_seed(0))
    torch.testing.assert_close(y[:, 0], y[:, 2])                                         # grey stays grey
    contrast = y[:, 0].std((1, 2))/grey[:, 0].std((1, 2))
    assert .5 <= contrast.min() < .55 and 1.45 < contrast.max() <= 1.5


def test_augmentation_refuses_an_unknown_word_and_a_single_image():
    with pytest.raises(UserError, match="no augmentation named 'colour'; nearest: color"): diff_augment(image(), 'colour')
    with pytest.raises(UserError, match='batch axis'): diff_augment(image()[0])


def test_blur():
    assert check(lambda x: blur(x, 1.1), rand(1, 2, 6, 7).requires_grad_())
    x = image(2, 20, 24)
    k = torch.tensor([2.**-((i/1.5)**2) for i in range(-4, 5)])
    want = F.conv2d(x.flatten(0, 1)[:, None], (k[:, None]*k/k.sum()**2)[None, None], padding=4)[:, 0].unflatten(0, (2, 3))
    torch.testing.assert_close(blur(x, 1.5), want, atol=1e-6, rtol=1e-5)
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(blur(x, 1.5), blur(x, 1.5).float()) and blur(x, 1.5).dtype == torch.float32
    assert blur(x, 0) is x
    with pytest.raises(UserError, match='negative'): blur(x, -.5)


# parts ---------------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('shape', ((5,), (3, 4)))
def test_batch_norm_local(shape):
    norm = BatchNormLocal(6).double()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = rand(24, 6, *shape)
    plain = lambda x: F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
    torch.testing.assert_close(norm(x), torch.cat([plain(g) for g in x.split(8)]))
    torch.testing.assert_close(norm(x[:12]), torch.cat([plain(g) for g in x[:12].split(6)]))
    assert check(norm, x[:10, :, :2].clone().requires_grad_())
    for b in range(1, 9): torch.testing.assert_close(norm(x[:b]), plain(x[:b]))
    assert torch.equal(norm.eval()(x), norm.train()(x)) and set(norm.state_dict()) == {'weight', 'bias'}


def test_batch_norm_local_keeps_statistics_in_float32():
    x = (rand(8, 4, 50, dtype=torch.float32) + 300).bfloat16()
    got = BatchNormLocal(4)(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), BatchNormLocal(4)(x.float()), atol=.02, rtol=.01)


@pytest.mark.parametrize('b', (9, 11, 13, 17))
def test_batch_norm_local_names_a_batch_that_does_not_split(b):
    with pytest.raises(UserError, match=f'batch of {b} does not split .* use a multiple of 8') as e: BatchNormLocal(3)(torch.zeros(b, 3, 4))
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('kernel', (1, 9))
def test_spectral_conv_is_torchs(kernel):
    ours = SpectralConv(6, 5, kernel)
    ref = nn.utils.spectral_norm(nn.Conv1d(6, 5, kernel, padding=kernel//2, padding_mode='circular'))
    ref.load_state_dict(ours.state_dict())
    x, y = (rand(2, 6, 12, dtype=torch.float32).requires_grad_() for _ in range(2))
    for mode in (True, True, False):
        ours.train(mode), ref.train(mode)
        a, b = ours(x), ref(y)
        torch.testing.assert_close(a, b)
        for g, w in zip(torch.autograd.grad(a.square().sum(), (x, ours.weight_orig)), torch.autograd.grad(b.square().sum(), (y, ref.weight_orig)), strict=True):
            torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-4)
    for k, v in ref.state_dict().items(): torch.testing.assert_close(ours.state_dict()[k], v)


def test_two_forwards_before_one_backward():
    conv = SpectralConv(4, 4)
    (conv(torch.ones(1, 4, 3)) + conv(torch.zeros(1, 4, 3))).sum().backward()  # u and v have moved meanwhile
    assert conv.weight_orig.grad.abs().sum() > 0


def test_a_head_does_not_see_what_the_whole_batch_shares():
    head, h = TokenHead(16), rand(4, 20, 16, dtype=torch.float32)
    head.eval()
    torch.testing.assert_close(head(h), head(h+rand(16, seed=2, dtype=torch.float32)), atol=1e-5, rtol=1e-4)


# the class token -----------------------------------------------------------------------------------------------------------------------------------

FAMILIES = {'test_vit': {}, 'test_vit3': {}, 'deit_tiny_distilled_patch16_224': dict(depth=2), 'eva02_tiny_patch14_224': dict(depth=2),
            'beit_base_patch16_224': dict(depth=2, img_size=96), 'vit_small_patch14_reg4_dinov2': dict(depth=2, img_size=112),
            'vit_base_patch16_siglip_224': dict(depth=2), 'vit_relpos_base_patch16_cls_224': dict(depth=2)}


@pytest.mark.parametrize('name', FAMILIES)
def test_class_token_is_added_to_every_patch_token(name):
    torch.manual_seed(0)
    vfm = VFM(name, pretrained=False, **FAMILIES[name])
    for p in vfm.net.parameters():
        if p.abs().max() < 1e-3: nn.init.normal_(p, std=.1)
    net, x, seen = vfm.net, image(2, *vfm.net.patch_embed.img_size), []
    hooks = [b.register_forward_hook(lambda m, args, out: seen.append(out)) for b in net.blocks]
    vfm.features(x, [vfm.depth])
    for h in hooks: h.remove()
    layers = [*range(1, vfm.depth+1)]
    plain, got = vfm.features(x, [0, *layers, -1]), vfm.features(x, [0, *layers, -1], cls=True)
    has = getattr(net, 'cls_token', None) is not None
    assert has == (name not in ('vit_base_patch16_siglip_224', 'test_vit3'))  # nothing before the patches; a register alone
    for layer, h in zip(layers, seen, strict=True):
        torch.testing.assert_close(got[layer], plain[layer]+h[:, :1] if has else plain[layer], atol=1e-5, rtol=1e-5)
    for layer in (0, -1):
        added = got[layer]-plain[layer]
        torch.testing.assert_close(added, added[:, :1].expand_as(added), atol=1e-4, rtol=1e-4)
        assert (added.abs().max() > 1e-3) == has


# projected discriminator -----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('mode', (True, False))
@pytest.mark.parametrize('side', (16, 32, 64, 80, (48, 100)))
def test_any_size_of_image(D, side, mode):
    h, w = side if isinstance(side, tuple) else (side, side)
    x = image(3, h, w).requires_grad_()
    out = D.train(mode)(x)
    assert out.shape == (3, 5*64)
    gan_loss_g(out).backward()
    assert x.grad.abs().sum((1, 2, 3)).min() > 0


def test_only_the_heads_learn(D, vfm):
    before = {k: v.clone() for k, v in D.state_dict().items()}
    opt = torch.optim.Adam(D.trainable().values(), lr=1e-2)
    for turn in (True, False, True):  # a decoder's turn between two of D's
        D.requires_grad_(turn)
        fake = image(4, seed=1).requires_grad_()
        loss = sum(gan_loss_d(D(image(4)), D(fake.detach()))) if turn else gan_loss_g(D(fake))
        opt.zero_grad()
        loss.backward()
        assert (fake.grad is None) == turn
        if turn: opt.step()
        else: assert fake.grad.abs().sum((1, 2, 3)).min() > 0 and all(p.grad is None for p in D.parameters())
    moved = {k for k, v in D.state_dict().items() if not torch.equal(v, before[k])}
    assert not any(k.startswith('vfm.') for k in moved) and {k for k in D.trainable() if k.endswith('weight_orig')} <= moved
    assert all(p.grad is None and not p.requires_grad for p in vfm.parameters())
    assert not any(m.training for m in D.train().vfm.modules()) and D.heads.training


def test_training_mode_is_random_and_seeded_evaluation_is_not(D):
    x = image(4, 80)
    state = {k: v.clone() for k, v in D.own_state().items()}
    def seeded(seed):
        D.load_own_state(state)
        torch.manual_seed(seed)
        return D(x)
    D.train()
    assert torch.equal(seeded(1), seeded(1)) and not torch.equal(seeded(1), seeded(2))
    D.eval()
    assert torch.equal(seeded(1), seeded(2)) and all(torch.equal(v, state[k]) for k, v in D.own_state().items())
    assert torch.equal(D.preprocess(x), resize(x, 64, mode=D.vfm.interpolation))


def test_large_images_are_cropped_half_of_the_time(vfm):
    D, x = ProjectedDiscriminator(vfm, policy='').train(), image(1, 80, 72)
    windows = {tuple(x[0, :, i:i+64, j:j+64].flatten()[:9].tolist()): (i, j) for i in range(17) for j in range(9)}
    seen = [windows.get(tuple(D.preprocess(x).flatten()[:9].tolist())) for _ in range(400)]
    crops = [s for s in seen if s]
    assert 150 < len(crops) < 250 and {i for i, _ in crops} == set(range(17)) and {j for _, j in crops} == set(range(9))
    D.crop = False
    assert all(torch.equal(D.preprocess(x), resize(x, 64)) for _ in range(5))
    D.crop = True
    assert all(torch.equal(D.preprocess(x[..., :64, :]), resize(x[..., :64, :], 64)) for _ in range(5))  # too small on one side


def test_state_without_the_vfm(D, vfm, tmp_path):
    D(image(4))
    path = save_weights(tmp_path/'d.safetensors', D.own_state(), {})
    twin = ProjectedDiscriminator(vfm).eval()
    twin.load_own_state(load_weights(path)[0])
    assert torch.equal(twin(image()), D.eval()(image())) and torch.equal(pickle.loads(pickle.dumps(D))(image()), D(image()))
    assert set(D.own_state()) == {k for k in D.state_dict() if not k.startswith('vfm.')} and set(D.trainable()) < set(D.own_state())
    fewer = ProjectedDiscriminator(vfm, [1, 2, 3, 4]).own_state()
    with pytest.raises(UserError, match='missing: heads.4.main.0.0'): D.load_own_state(fewer)
    with pytest.raises(UserError, match='extra: x') as e: D.load_own_state(D.own_state() | {'x': torch.zeros(1)})
    assert '\n' not in str(e.value)


def test_names_do_not_depend_on_the_layers(vfm):
    D = ProjectedDiscriminator(vfm, layers=[-1, 2])
    assert {k.split('.')[1] for k in D.own_state()} == {'0', '1'}
    h = vfm.features(image(), [-1, 2])
    want = torch.cat([D.eval().heads[str(i)](h[layer]) for i, layer in enumerate((-1, 2))], 1)
    torch.testing.assert_close(D(image()), want)


def test_a_vfm_whose_native_size_is_no_multiple_of_its_patch():
    from timm.models import VisionTransformer
    torch.manual_seed(0)
    net = VisionTransformer(img_size=70, patch_size=16, embed_dim=48, depth=3, num_heads=3, num_classes=0, dynamic_img_size=True)
    D = ProjectedDiscriminator(VFM('odd', net=net))
    assert D.size == 64 and D.layers == [1, 2, 3, 0] and D(image(2, 70)).shape == (2, 4*16)
    assert ProjectedDiscriminator(VFM('odd', net=net), size=48)(image(2)).shape == (2, 4*9)
    no_antialias = ProjectedDiscriminator(VFM('tiny', net=tiny_vit(), pos_antialias=False), size=32)
    assert no_antialias(image(2)).shape == (2, 5*16)


def test_bad_discriminators_are_refused(vfm, D):
    for kwargs, say in ((dict(layers=[]), 'at least one'), (dict(layers=[4, -2]), 'different'), (dict(layers=[5]), 'no layer 5'),
                        (dict(size=60), 'multiple of the patch'), (dict(size=8), 'at least 16'),
                        (dict(policy='colour'), 'nearest: color'), (dict(mode='nearest'), "'bilinear' or 'bicubic'")):
        with pytest.raises(UserError, match=say) as e: ProjectedDiscriminator(vfm, **kwargs)
        assert '\n' not in str(e.value)
    for net in (D, PatchGAN(4)):
        for bad in (image()[0], image()[:, :1]):
            with pytest.raises(UserError, match='takes images'): net(bad)
    with pytest.raises(UserError, match='batch of 9'): D(image(9))


@pytest.mark.parametrize('size', (16, 24))
def test_few_tokens(vfm, size): assert ProjectedDiscriminator(vfm, size=size)(image(2)).shape == (2, 5*(size//8)**2)


# PatchGAN --------------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('h,w', ((1, 1), (16, 16), (17, 40), (64, 64)))
def test_patch_gan_at_any_size(h, w):
    x = image(2, h, w).requires_grad_()
    out = PatchGAN(4)(x)
    assert [len(s) for s in out] == [5]*3 and [[t.shape[1] for t in s] for s in out] == [[4, 8, 16, 32, 1]]*3
    side = h
    for s in out:
        n = side
        for j, t in enumerate(s):
            n = n//2+1 if j < 3 else n+1
            assert t.shape[2] == n
        side = (side+1)//2
    (gan_loss_g(out, 'mse') + sum(t.square().sum() for s in out for t in s)).backward()
    assert h == 1 or x.grad.abs().sum((1, 2, 3)).min() > 0


def test_patch_gan_scales_are_separate_and_half_as_large():
    P, x = PatchGAN(4), image(2, 33)
    small = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
    for i, s in enumerate((x, small, F.avg_pool2d(small, 3, 2, 1, count_include_pad=False))):
        h = s
        for j, want in enumerate(P(x)[i]): torch.testing.assert_close(h := P.get_submodule(f'scale{2-i}_layer{j}')(h), want)
    torch.testing.assert_close(F.avg_pool2d(torch.ones(1, 3, 7, 7), 3, 2, 1, count_include_pad=False), torch.ones(1, 3, 4, 4))


def test_patch_gan_starts_as_published_and_keeps_its_state():
    P = PatchGAN()
    for k, p in P.named_parameters():
        if p.ndim == 4: assert abs(p.std()-.02) < 2e-3 and abs(p.mean()) < 1e-3
        elif k.endswith('.1.weight'): assert (p == 1).all()
        elif k.endswith('.1.bias'): assert (p == 0).all()
        else: assert 0 < p.abs().max() <= P.state_dict()[k.replace('bias', 'weight')][0].numel()**-.5
    a, b = PatchGAN(4, num_layers=2, num_scales=2), PatchGAN(4, num_layers=2, num_scales=2)
    b.load_own_state(a.own_state())
    assert [len(s) for s in a(image())] == [4, 4]
    assert all(torch.equal(s, t) for u, v in zip(a(image()), b(image()), strict=True) for s, t in zip(u, v, strict=True))
    with pytest.raises(UserError, match='misshaped'): PatchGAN(8, num_layers=2, num_scales=2).load_own_state(a.own_state())
    with pytest.raises(UserError, match='at least 1'): PatchGAN(num_layers=0)


# half precision ----------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('make', (lambda vfm: ProjectedDiscriminator(vfm, policy=''), lambda vfm: PatchGAN(8)), ids=('projected', 'patch'))
def test_autocast_trains_and_agrees(vfm, make):
    torch.manual_seed(0)
    net, x = make(vfm).eval(), image(4).requires_grad_()
    listed = lambda out: [out] if isinstance(out, torch.Tensor) else [s[-1] for s in out]
    exact = listed(net(x))
    with torch.autocast('cpu', torch.bfloat16):
        rough = listed(net(x))
        for a, b in zip(rough, exact, strict=True): assert a.dtype == torch.bfloat16 and (a-b).abs().max() < .1*b.std()
        loss = sum(gan_loss_d(net.train()(x), net(x)))
        loss.backward()
    assert loss.dtype == torch.float32 and x.grad.isfinite().all()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.trainable().values())
    assert all(v.dtype == torch.float32 for v in net.own_state().values())
