"LPIPS and other wrapped networks against the packages they come from, on random trunks."
import pytest
import torch
from torchvision.models.vgg import cfgs, make_layers

from vfmvae.core import UserError
from vfmvae.files import save_weights
from vfmvae.losses import lpips, perceptual, pixel, ssim_loss


@pytest.fixture(scope='module')
def vgg():
    torch.manual_seed(0)
    return {f'features.{k}': v for k, v in make_layers(cfgs['D']).state_dict().items()}


@pytest.fixture(scope='module')
def reference(vgg):
    "torchmetrics' own module with its own calibrated layers, as it loads them by default."
    from torchmetrics.functional.image import lpips as theirs
    with pytest.MonkeyPatch.context() as m:         # the trunk's classifier is half a gigabyte that nobody reads
        m.setattr(theirs, '_get_tv_model_features', lambda *_: make_layers(cfgs['D']))
        net = theirs._LPIPS(net='vgg', pnet_rand=True).eval()
    for k, p in net.net.named_parameters(): p.data.copy_(vgg['features.'+k.split('.', 1)[1]])
    return net


def images(seed, size=16): return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed))*2-1


@pytest.mark.parametrize('spoil, says', [(torch.Tensor.byte, 'hold integers'), (lambda x: x[:, :1], r'are \(b,3,H,W\)'), (lambda x: x[0], r'are \(b,3,H,W\)'),
                                         (lambda x: x[:1], 'cannot be compared')])
def test_losses_take_images_alone(vgg, spoil, says):
    "Bytes and grey images, which broadcast, gave a number."
    x, net = images(0), lpips(vgg)
    for f in (pixel, ssim_loss, net, lambda x, y: perceptual(x, y, lambda x: [x])):
        for pair in ((x, spoil(x)), (spoil(x), x)):
            with pytest.raises(UserError, match=says): f(*pair)
    for f in (pixel, net): assert f(x*float('nan'), x).isnan()          # training names it
    assert net(x.double(), images(1).double()) == net(x, images(1))     # it was a foreign RuntimeError


@torch.no_grad()
def test_lpips_is_torchmetrics_own(vgg, reference, tmp_path):
    x, y = images(0), images(1)
    want, ours = reference(x, y).mean(), lpips(vgg)
    torch.testing.assert_close(ours(x, y), want, atol=1e-6, rtol=0)
    assert torch.equal(ours(x, y), lpips(vgg)(x, y)) and ours(x, x) == 0
    lins = {k: v for k, v in ours.net.state_dict().items() if k.startswith('lin')}
    assert len(lins) == 10 and all((v >= 0).all() for v in lins.values())
    assert all(torch.equal(v, ours.net.state_dict()[k]) for k, v in reference.state_dict().items())
    torch.save(vgg, tmp_path/'vgg.pth')
    save_weights(tmp_path/'vgg.safetensors', vgg, {})
    for file in ('vgg.pth', 'vgg.safetensors'): assert torch.equal(lpips(tmp_path/file)(x, y), ours(x, y))


@pytest.mark.parametrize('size', [(15, 40), (40, 8), (1, 1), (16, 16), (16, 40)])
def test_lpips_of_small_images_is_a_number_or_one_line(vgg, reference, size):
    "VGG16 halves them four times: of 15 px nothing is left, which torch says of a layer's sizes."
    x, y = (torch.rand(1, 3, *size)*2-1 for _ in range(2))
    if min(size) > 15: return torch.testing.assert_close(lpips(vgg)(x, y), reference(x, y).mean(), atol=1e-6, rtol=0)
    with pytest.raises(RuntimeError, match='too small'): reference(x, y)
    with pytest.raises(UserError, match='LPIPS needs 16 px a side'): lpips(vgg)(x, y)


def test_lpips_keeps_nothing_of_the_callers_weights_and_no_gradient(vgg):
    mine = {k: v.clone() for k, v in vgg.items()}
    net, x, y = lpips(mine), images(0).requires_grad_(), images(1)
    before = net(x, y)
    for v in mine.values(): v.zero_()
    assert torch.equal(net(x, y), before) and not any(p.requires_grad for p in net.parameters()) and not net.train().training
    before.backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize('spoil, says', [
    (lambda v: {k: t for k, t in v.items() if k != 'features.7.bias'}, '1 missing: features.7.bias'),
    (lambda v: v | {'features.0.weight': v['features.0.weight'][:, :1]}, r'features.0.weight \(64, 1, 3, 3\) for \(64, 3, 3, 3\)'),
    (lambda v: v | {'features.5.bias': v['features.5.bias']*float('nan')}, 'features.5.bias of .* NaN'),
    (lambda v: v | {'features.5.bias': v['features.5.bias'].long()}, 'features.5.bias of .* int64'),
    (lambda v: v | {'features.5.bias': v['features.5.bias'].cfloat()}, 'complex'),
    (lambda v: {}, '26 missing')])
def test_a_spoilt_trunk_is_one_line(vgg, spoil, says):
    with pytest.raises(UserError, match=says) as e: lpips(spoil(vgg))
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('content', [
    b'', b'hello', b'PK\x03\x04 not a zip', b'\x80\x02}q\x00.', b'\x80\x02cos\nsystem\nq\x00X\x02\x00\x00\x00lsq\x01\x85Rq\x02.'])
def test_a_damaged_file_is_one_line(content, tmp_path):
    (tmp_path/'vgg16-397923af.pth').write_bytes(content)
    with pytest.raises(UserError) as e: lpips(tmp_path/'vgg16-397923af.pth')
    assert '\n' not in str(e.value)
    with pytest.raises(UserError, match='no VGG16 weights'): lpips(tmp_path/'none.pth')
