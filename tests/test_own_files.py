"""What lies where this library writes and is not its own stays; what it reads survives what is odd or broken among it."""
import json, os
from dataclasses import replace
import numpy as np
import pytest
import torch
from PIL import Image
from vfmvae import files
from vfmvae.core import Gaussian, Notice, UserError
from vfmvae.data import as_dataset, loader
from vfmvae.demo import demo
from vfmvae.features import as_images, batches, extract
from vfmvae.files import check_out, inside, save_weights, sweep, Table, write_json
from vfmvae.flow_task import FlowConfig
from vfmvae.folders import folder
from vfmvae.generation import train_jointly
from vfmvae.images import check_pictures, write_png
from vfmvae.latents import cache_latents, LatentCache
from vfmvae.layouts import export_latents, import_latents
from vfmvae.presets import FLOW_PRESETS
from vfmvae.recipes import open_data, picture_files
from vfmvae.run import checkpoints, EMA, Run
from vfmvae.protocols import LatentStats
from vfmvae.train import constant, fit, warm_cosine
from vfmvae.world import World


def refused(words): return pytest.raises(UserError, match=words)


@pytest.fixture
def pictures(tmp_path):
    "A folder of twenty, of which the eighth is cut off."
    rng = np.random.default_rng(0)
    (made := tmp_path/'pictures').mkdir()
    for i in range(20): Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(made/f'{i:02d}.jpg')
    (cut := made/'07.jpg').write_bytes(cut.read_bytes()[:600])
    return made


class Task:
    "The smallest that `fit` trains."
    def __init__(self):
        net = torch.nn.Linear(1, 1)
        self.nets, self.ema, self.optimizers = dict(net=net), EMA(net, 50), dict(net=torch.optim.SGD(net.parameters(), lr=.1))
    def config(self): return {}
    def step(self, micro, backward, sync, seen):
        net, opt = self.nets['net'], self.optimizers['net']
        opt.zero_grad()
        loss = sum(net(b['image'].mean().view(1, 1)).square().mean() for b in micro)
        backward(loss)
        sync()
        opt.step()
        return dict(loss=loss.item())


def test_a_run_removes_its_own_checkpoints_alone(tmp_path):
    (run := tmp_path/'run').mkdir()
    theirs = ['shard-000000.tar', 'shard-00000.safetensors', 'step-by-step/notes.md', 'step-1.txt', 'shard-list.json', 'metadata.jsonl']
    for k in theirs:
        (run/k).parent.mkdir(exist_ok=True)
        (run/k).write_text('[1]\n{"step": 7, "a":   2}\n')
    task, feed = Task(), loader(World(20), 2)
    fit(task, feed, 12, Run(run), save_every=1, show=lambda rows: None)
    assert [p.name for p in checkpoints(run)] == ['step-00000005.safetensors', 'step-00000006.safetensors']
    assert {(run/k).read_text() for k in theirs} == {'[1]\n{"step": 7, "a":   2}\n'}


def test_somebody_elses_json_is_not_replaced(tmp_path):
    write_json(tmp_path/'config.json', dict(_class_name='AutoencoderKL'))
    with refused('config.json is there already and belongs to no run of ours'): Run(tmp_path)
    write_json(tmp_path/'mine.json', dict(notes=1))
    with refused('mine.json .* no weights of ours'): check_out(tmp_path/'mine.safetensors', '.safetensors')     # before a training, not after it
    save_weights(tmp_path/'ours.safetensors', dict(a=torch.ones(2)), {})
    (tmp_path/'ours.safetensors').unlink()
    assert check_out(tmp_path/'ours.safetensors', '.safetensors')          # a JSON of ours that its weights left behind
    assert json.loads((tmp_path/'mine.json').read_text()) == dict(notes=1)
    (tmp_path/'index.html').write_text('my page')
    with refused('holds another page'): demo(out=tmp_path)
    write_json(tmp_path/'samples.json', [1])
    with refused('samples.json .* no pictures of ours'): check_pictures(tmp_path, {'a.png'})


class Means:
    "A tokenizer: means of 8 x 8 pixels."
    name, stride, channels, stats = 'means-f8d3', 8, 3, LatentStats(3)
    def encode(self, x): return Gaussian(torch.nn.functional.avg_pool2d(x, 8))
    def decode(self, z): return torch.nn.functional.interpolate(z, scale_factor=8)


def test_a_joint_training_asks_for_both_its_files_before_it_begins(tmp_path):
    write_json(tmp_path/'net-tokenizer.json', dict(notes=1))
    net = replace(FLOW_PRESETS['dit-vfmvae-tiny-f8d16'], flow=FlowConfig(weights=dict(flow=1., repa=.5)))
    with refused('net-tokenizer.json .* no weights of ours'): train_jointly('tiny', net, out=tmp_path/'net.safetensors')


def test_a_cache_is_not_written_over_another_programs_manifest(tmp_path):
    write_json(tmp_path/'manifest.json', dict(name='my app'))
    with refused('manifest.json is there already and belongs to no latents of ours'): cache_latents(Means(), World(4), tmp_path)
    assert json.loads((tmp_path/'manifest.json').read_text()) == dict(name='my app')


@pytest.mark.parametrize('layout', ['lightningdit', 'reg'])
def test_an_export_is_not_mixed_with_a_larger_one(tmp_path, layout):
    caches = [cache_latents(Means(), World(n), tmp_path/f'{n}', flips=True, shard_size=4) for n in (12, 6, 12)]
    export_latents(caches[0], tmp_path/'out', layout)
    with refused(r'out holds more latents than these \(.*\), of another export'): export_latents(caches[1], tmp_path/'out', layout)
    export_latents(caches[2], tmp_path/'out', layout)          # as many: each file is written again
    assert len(LatentCache(import_latents(tmp_path/'out', tmp_path/'back', layout, 'means-f8d3').dir)) == 12


def test_hidden_files_of_other_programs_stay(tmp_path):
    (tmp_path/'.thesis.tmp').mkdir()
    (tmp_path/'.a.b-1-c.tmp').write_text('')
    ours = tmp_path/f'.net.json.{"0"*6}-12-{"a"*8}.tmp'          # of another machine
    ours.mkdir()
    for p in tmp_path.iterdir(): os.utime(p, (1, 1))
    assert sweep(tmp_path) == [ours] and {p.name for p in tmp_path.iterdir()} == {'.thesis.tmp', '.a.b-1-c.tmp'}


def test_pictures_of_ones_own_are_not_drawn_over(tmp_path):
    mine = Image.new('RGB', (32, 32), 'red')
    mine.save(tmp_path/'000000.png')
    for ask in (lambda: check_pictures(tmp_path, {'000000.png'}), lambda: picture_files(tmp_path, ['000000.png'])):
        with refused('holds 1 other pictures, such as 000000.png'): ask()
    assert Image.open(tmp_path/'000000.png').getpixel((0, 0)) == (255, 0, 0)
    (tmp_path/'000000.png').unlink()
    write_png(tmp_path/'000000.png', torch.zeros(3, 16, 16))
    assert picture_files(tmp_path, ['000000.jpg']) == [tmp_path/'000000.png']          # ours is drawn again


def test_pictures_that_were_given_by_their_paths_can_be_written(tmp_path):
    names = [p.relative_to(tmp_path).as_posix() for p in picture_files(tmp_path, ['/a/b/cat.png', '/a/dog.jpg'])]
    assert names == ['b/cat.png', 'dog.png'] and picture_files(tmp_path, ['/a/b/cat.png']) == [tmp_path/'cat.png']
    for bad in (['../cat.png'], ['/a/cat.png', '../dog.png'], ['/a/../../cat.png', '/a/b.png']):
        with refused('cannot be a file below'): picture_files(tmp_path, bad)


def test_a_name_that_is_no_utf8_is_a_name(tmp_path):
    odd = os.fsdecode(b'caf\xe9.png')
    assert inside(tmp_path, odd).name == odd
    assert b'caf\xe9.png' in Table([dict(key=odd)]).csv(tmp_path/'t.csv').read_bytes()
    with refused('cannot be a file below'): inside(tmp_path, 'ä'*121)          # of bytes, not of letters


def test_a_damaged_picture_does_not_end_a_training(pictures):
    feed = loader(folder(pictures, 16), 20)
    with pytest.warns(Notice, match='07.jpg cannot be read .*the next image stands in'): batch = feed.batch_at(0)
    assert batch['image'].shape[0] == 20 and '07.jpg' not in batch['key'] and batch['key'].count('08.jpg') == 2
    with refused('07.jpg cannot be read'): folder(pictures, 16).batch([7])    # who measures is told
    for p in pictures.iterdir(): p.write_bytes(p.read_bytes()[:600])
    with refused('cannot be read'): feed.batch_at(0)                # all of them: that is no damage of one file


def test_dots_in_names_of_a_tar_are_said(tmp_path, pictures):
    import tarfile
    with tarfile.open(tmp_path/'shots.tar', 'w') as tar:
        for name in ('a.jpg', 'IMG.2019.jpg', 'Shot 10.30.15.jpg'): tar.add(pictures/'00.jpg', name)
    with pytest.warns(Notice, match='left out 2 picture with dots in its name'): assert len(open_data(tmp_path/'shots.tar', 16)) == 1


def test_a_shard_that_is_missing_is_missed_beside_brackets_too(tmp_path, pictures):
    import tarfile
    (odd := tmp_path/'x[1]').mkdir()
    for i in (0, 2):
        with tarfile.open(odd/f'a-{i:03d}.tar', 'w') as tar: tar.add(pictures/'00.jpg', f'{i}.jpg')
    with refused('a-001.tar'): open_data(odd/'a-{000..002}.tar', 16)


def test_one_array_is_one_picture_and_a_column_has_an_order(pictures):
    pd = pytest.importorskip('pandas')
    with refused('is one picture; give a list of them'): as_dataset(np.zeros((64, 64, 3), np.uint8))
    assert len(as_dataset(np.zeros((4, 64, 64, 3), np.uint8))) == 4
    paths = [str(pictures/f'{i:02d}.jpg') for i in range(3)]
    assert [*as_dataset(pd.Series(paths, index=[2, 0, 1])).keys] == paths


class Mean:
    "A source: the mean of each channel."
    name, layers = 'mean', ('mean',)
    def features(self, x, layers=None): return dict(mean=x.mean((2, 3))[:, None])


@pytest.mark.parametrize('given', [list, tuple, lambda x: [torch.stack(x[:2]), torch.stack(x[2:])]])
def test_pictures_from_0_to_1_mean_the_same_by_every_door(given):
    x = [*torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))]
    with pytest.warns(Notice, match='from 0 to 1'): seen = as_images(given(x))
    assert torch.equal(torch.cat([b['image'] for b in batches(seen, 2)]), torch.stack(x)*2-1) and as_images(seen) is seen
    with pytest.warns(Notice, match='from 0 to 1'): bright = extract(Mean(), given([.75+i/8 for i in x]), quiet=True)
    assert torch.allclose(bright['mean'], torch.stack(x).mean((2, 3))/4+.5, atol=1e-6)      # once, though two functions ask
    assert as_images([i*2-1 for i in x])[0].min() < 0


def test_a_schedule_of_another_length_is_said(tmp_path, recwarn):
    feed = loader(World(20), 2)
    def go(n, rate): fit(Task(), feed, n, Run(tmp_path/'run'), rate, log_every=1, show=lambda rows: None)
    def said(): return [str(w.message) for w in recwarn.list if 'learning rate' in str(w.message)]
    go(8, warm_cosine(.1, 4, 1))
    go(8, warm_cosine(.1, 4, 1))
    assert not said()
    go(12, warm_cosine(.1, 6, 1))
    assert len(said()) == 1 and 'does not go on as one of this length' in said()[0]
    recwarn.clear()
    go(16, warm_cosine(.1, 6, 1))
    fit(Task(), feed, 8, Run(tmp_path/'other'), constant(.1), log_every=1, show=lambda rows: None)
    fit(Task(), feed, 12, Run(tmp_path/'other'), .1, log_every=1, show=lambda rows: None)
    assert not said() and files.is_file(tmp_path/'other'/'log.jsonl')
