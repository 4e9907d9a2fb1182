"""The fast forms against the plain ones of `reference.py` (the decoder's: test_decode.py), and the clock of `benchmarks/speed.py` that compares them."""
import json, time
from pathlib import Path

import pytest
import speed
import torch
from reference import plain_cknna, plain_velocity

from vfmvae.align import cknna
from vfmvae.dit import DiT, DiTConfig

ROOT = Path(__file__).resolve().parent.parent


def test_the_velocity_net_is_its_plain_form():
    torch.manual_seed(0)
    net = DiT(DiTConfig(in_channels=16, num_classes=16, patch_size=2, hidden_size=64, depth=3, num_heads=2, norm='rms', mlp='swiglu', rope=True,
                        qk_norm='rms')).eval()
    for p in net.parameters(): torch.nn.init.normal_(p, std=.1)
    z, t, y = torch.randn(3, 16, 8, 8), torch.rand(3), torch.tensor([0, 5, 16])
    torch.testing.assert_close(net(z, t, y), plain_velocity(net, z, t, y), atol=1e-4, rtol=0)


@pytest.mark.parametrize('n, k', [(40, 3), (600, 10), (1500, 10)])
def test_cknna_is_its_dense_form(n, k):
    a, b = speed.two_views(n, 24)
    assert abs(cknna(a, b, k) - plain_cknna(a, b, k)) < 1e-4


def test_the_clock_takes_turns():
    naps = speed.take_turns(dict(short=lambda: time.sleep(.01), long=lambda: time.sleep(.05)), 3)
    assert .01 <= naps['short']['wall'] and .05 <= naps['long']['wall'] and naps['long']['cpu'] < .02 and len(naps['long']['all']) == 3
    a, b = torch.randn(2, 64, 64)
    assert speed.flops(lambda: a @ b) == 2*64**3


def test_rows_of_a_smoke_size_have_the_keys_of_the_committed_ones():
    def kept(name): return json.loads((ROOT/'data/results'/f'{name}.json').read_text())['rows']
    tiny = {j: speed.decoder_row('tiny', j, rounds=1, memory=j == 'decode', batch=2) for j in ('decode', 'train')}
    assert tiny['decode']['difference'] < 2e-5 and tiny['train']['gflop_per_image'] > 2*tiny['decode']['gflop_per_image']
    assert tiny['decode'].keys() == kept('bench')['tiny decode'].keys() and tiny['decode']['ours'].keys() == kept('bench')['tiny decode']['ours'].keys()
    assert tiny['decode']['plain']['memory_mb']['model'] > 50
    small = speed.cknna_row(300, 16, 200, 1, memory=False)
    assert small['difference'] < 1e-4 and small['ratio'] > 0 and {*small, 'extra_mib'} == {*kept('bench_cknna')[0]}
    step = speed.flow_row(batch=2, rounds=1)
    assert step['ours'].keys() == kept('bench_flow')[0]['ours'].keys() and step['ours']['images_per_s'] > 0
    full = kept('bench')['full decode']
    assert full['difference'] < 2e-4 and abs(full['gflop_per_image'] - 388.1) < 4      # of the published decoder
    talk = speed.captions_row(batch=4, rounds=1)
    assert talk.keys() == kept('bench_captions')[0].keys() and talk['classes']['speedup'] == 1
    for rows in (tiny, [small], [step], [talk], kept('bench_labs')): assert len([*speed.told(rows)]) == len(rows)


def test_a_burst_of_moves_is_not_computed_move_by_move():
    from vfmvae.labs import ReconstructionLab
    lab = ReconstructionLab(edit='noise')
    got = speed.latency(lab, [('amount', .1), ('amount', .75)], [('amount', s) for s in (.1, .25, .5, .75)*5])
    assert got['events'] == 2 and 1 <= got['burst_computations'] <= 12 and lab.state.amount == .75


@pytest.mark.parametrize('words, said', [(['decode'], "no part 'decode'"), (['--device', 'cuda:9'], "no device 'cuda:9'"), (['--rounds', '0'], 'rounds')])
def test_a_wrong_word_is_one_line(capsys, words, said):
    with pytest.raises(SystemExit): speed.main(words)
    assert said in capsys.readouterr().err
