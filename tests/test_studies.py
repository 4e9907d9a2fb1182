"""A study: runs that are shared, resumed and measured once, and a table that says of each number where it comes from."""
import csv, json, os, shutil, subprocess, sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
import pandas as pd
import pytest
import torch
from filelock import FileLock
from vfmvae import studies
from vfmvae.core import build_config, Notice, UserError
from vfmvae.dit import DiT
from vfmvae.evaluate import compare_statistics
from vfmvae.generation import generate, JOINT
from vfmvae.images import from_uint8, to_uint8
from vfmvae.presets import PRESETS
from vfmvae.recipes import build_training, evaluate_tokenizer, open_data, schedule_stages
from vfmvae.statistics import compute_statistics
from vfmvae.studies import COLUMNS, study
from vfmvae.trials import joint_stage, MEASURES, open_study, override, Panel, Pictures, plan, trained_tokenizer
from vfmvae.tokenizer import load_tokenizer
from vfmvae.tokenizer_task import check_stage
from vfmvae.vfm import VFM
from vfmvae.world import World

ROOT = Path(__file__).resolve().parent.parent
WORLD = dict(train=dict(path='world', n=200, seed=100), test=dict(path='world', n=48, seed=8), exam=dict(path='world', n=64, seed=9), vfm='tiny',
             judges=['world'], references=['eye'])
SPEC = dict(data=dict(world=WORLD), eyes=dict(eye=dict(vfm='photo')), tokenizers=dict(plain='conv-f8d16', ours='vfmvae-photo-f8d16'), tokenizer_images=48,
            nets=dict(small='dit-vfmvae-photo-f8d16'), net_images=128, moments=2, latents=64, samples=24, final_samples=24, steps=2,
            common={'net.net.depth': 2, 'net.net.hidden_size': 32, 'net.net.num_heads': 2, 'net.cosine': 0, 'net.flips': False})


def quiet(_): pass


@pytest.fixture(scope='module')
def whole_study(tmp_path_factory):
    folder = tmp_path_factory.mktemp('study')
    spec = dict(SPEC, switches={'': {}, 'colder': {'net.flow.lr': 1e-4}})
    return folder, spec, study(spec, folder/'runs', folder/'study.csv', say=quiet)


def test_every_number_says_where_it_comes_from(whole_study):
    folder, spec, table = whole_study
    with open(folder/'study.csv', newline='', encoding='utf-8') as f: rows = [*csv.DictReader(f)]
    assert len(rows) == len(table) > 100 and tuple(rows[0]) == COLUMNS
    kept = json.loads((folder/'study.json').read_text())
    assert [dict(zip(kept['columns'], r, strict=True)) for r in kept['rows']] == table.rows and (table.runs, table.done) == (6, 6)
    # both files are one table for pandas, too
    same = lambda f: f.astype(dict(value=float)).astype(str).to_dict("records")
    assert same(pd.DataFrame(kept['rows'], columns=kept['columns'])) == same(pd.read_csv(folder/'study.csv', keep_default_na=False))
    assert all(r['value'] is not None and r['n'] > 0 and r['cpu_hours'] > 0 and r['hardware'] for r in table)
    assert {(r['tokenizer'], r['switch'], r['net']) for r in table} == {(t, s, n) for t in ('plain', 'ours') for s in ('', 'colder') for n in ('', 'small')}
    assert {r['metric'] for r in table} >= {*'psnr rfd gfd accuracy cknna se_cknna linear_latent knn_reconstruction viv lnc srss lpc ifd straightness'.split()}
    assert {r['images'] for r in table.where(net='')} == {48} and {r['images'] for r in table.where(metric='gfd')} == {64, 128}
    assert all(r['judge'] for r in table if r['metric'].startswith(('rfd', 'gfd', 'ifd', 'cknna', 'se_')))


def test_the_numbers_are_those_of_the_functions(whole_study):
    folder, spec, table = whole_study
    for t in [t for t in plan(open_study(spec), folder/'runs') if t.kind == 'tokenizer' and not t.switch]:
        want = evaluate_tokenizer(load_tokenizer(t.out), open_data('world', 64, n=48, seed=8), None, say=False)
        got = {r['metric']: r['value'] for r in table.where(tokenizer=t.tokenizer, switch='', net='')}
        assert {k: got[k] for k in ('psnr', 'ssim', 'l1')} == pytest.approx({k: want[k] for k in ('psnr', 'ssim', 'l1')}, rel=1e-5)
    pairs = [({r['metric']: r['value'] for r in table.where(tokenizer=t, switch='', net='')})['decoder_parameters'] for t in ('plain', 'ours')]
    assert max(pairs) < 1.05*min(pairs)


TOGETHER = {'net.vfms': ['tiny'], 'net.net.encoder_depth': 1, 'net.net.z_dims': [128], 'net.flow.weights': dict(flow=1., cosine=1., repa=.5)}


def test_a_tokenizer_and_its_net_learn_together_by_a_switch(tmp_path):
    spec = dict(SPEC, tokenizers=dict(ours='vfmvae-photo-f8d16'), measures=['curve', 'finish'], net_images=32, latents=32,
                common={**SPEC['common'], 'net.batch_size': 16},
                switches={'REPA': TOGETHER, 'together': TOGETHER | {'joint.weights': dict(l1=1., repa=1.5), 'joint.lr': 3e-3}})
    table = study(spec, tmp_path/'runs', say=quiet)
    assert (table.runs, table.done) == (3, 3)                                # one tokenizer, from which both nets begin
    runs = {t.switch: t for t in plan(open_study(spec), tmp_path/'runs') if t.net}
    plain, joint = (trained_tokenizer(runs[k]) for k in ('REPA', 'together'))
    assert joint_stage(runs['REPA']) is None and joint_stage(runs['together']) == replace(JOINT, weights=dict(l1=1., repa=1.5), lr=3e-3)
    x = World(4, seed=3).batch(range(4))['image']
    assert (plain.encode(x).mode()-joint.encode(x).mode()).abs().max() > 1e-3             # it has moved, and what is measured is what moved
    kept = load_tokenizer(runs['together'].folder/'net-tokenizer.safetensors')
    assert torch.equal(joint.stats.std, kept.stats.std) and not torch.equal(joint.stats.std, plain.stats.std)
    net, images = DiT.load(str(runs['together'].out)), Panel(open_study(spec), open_study(spec).data['world'], 64, tmp_path/'seen')
    drawn = compute_statistics(from_uint8(to_uint8(generate(net, 24, 0, joint, steps=2, guidance=1.).images)), images.judges['world'][0])
    want = compare_statistics(drawn, images.judges['world'][1], pr_n=0)['fd']
    found = {k: table.where(switch=k, metric='gfd', images=32, judge='world') for k in runs}
    assert all(len(f) == 2 for f in found.values()) and found['together'][-1]['value'] == pytest.approx(want, rel=1e-6)
    # at its first moment a net that learned alone is another one; of the other, the end alone is kept
    assert {r['images'] for r in table.where(switch='together', metric='gfd')} == {32} < {r['images'] for r in table.where(switch='REPA', metric='gfd')}
    costs = {r['run']: r['hours'] for r in study(spec, tmp_path/'new', dry_run=True, say=quiet)}
    assert costs[runs['together'].folder.name] > costs[runs['REPA'].folder.name]          # a step of both, not of the net alone


def test_the_runs_of_the_committed_table_are_those_of_its_file():
    "A recipe that says something new must not make what is finished another run."
    kept = json.loads((ROOT/'data/results/study.json').read_text(encoding='utf-8'))['folders']
    assert kept and {*kept} <= {t.folder.name for t in plan(open_study(ROOT/'data/studies/main.json'), 'runs')}


def test_a_second_call_trains_and_measures_nothing(whole_study, monkeypatch):
    folder, spec, table = whole_study
    for k in ('train_tokenizer', 'train_flow', 'Panel'): monkeypatch.setattr(studies, k, None)
    assert study(spec, folder/'runs', say=quiet).rows == table.rows


def test_a_table_takes_what_is_finished_to_another_machine(whole_study, tmp_path, monkeypatch):
    folder, spec, table = whole_study
    for end in ('.csv', '.json'): shutil.copy(folder/f'study{end}', tmp_path/f'here{end}')
    for k in ('train_tokenizer', 'train_flow', 'Panel'): monkeypatch.setattr(studies, k, None)
    assert study(spec, tmp_path/'runs', tmp_path/'here.csv', say=quiet).rows == table.rows
    assert (tmp_path/'here.json').read_text() == (folder/'study.json').read_text() and not [*(tmp_path/'runs').rglob('*.safetensors')]
    # one net more is asked for, or a measure that nobody took: then the weights of its tokenizer are needed, and nothing of it is put back
    more = dict(spec, switches=dict(spec['switches'], hotter={'net.flow.lr': 2e-3}))
    assert not studies._earlier(tmp_path/'here.json', plan(open_study(more), tmp_path/'more'))
    kept = json.loads((tmp_path/'here.json').read_text())
    del kept['folders'][(lost := next(n for n in kept['folders'] if 'VFM' not in n and 'small' in n))]
    (tmp_path/'less.json').write_text(json.dumps(kept))
    back = {p.parent.name for p in studies._earlier(tmp_path/'less.json', plan(open_study(spec), tmp_path/'less'))}
    assert lost not in back and back < {*kept['folders']}
    for p, said in studies._earlier(tmp_path/'less.json', plan(open_study(spec), tmp_path/'some')).items(): studies.write_json(p, said)
    assert all(t.finished for t in plan(open_study(spec), tmp_path/'some') if t.folder.name in back)
    # a price is asked of what is left, and writes nothing; another file is no table, and stays
    left = study(spec, tmp_path/'less', tmp_path/'less.csv', dry_run=True, say=quiet)
    assert {r['run'] for r in left} == {*kept['folders'], lost} - back and not (tmp_path/'less').exists()
    # rows under other names are another run's: it is trained once more, and nothing of it is put back
    # (of nets alone: they need the weights of their tokenizers, and nothing of those is put back either)
    for renamed in (lambda r: True, lambda r: r['net']):
        other = json.loads((tmp_path/'here.json').read_text())
        other['rows'] = [r[:2] + ['other'] + r[3:] if renamed(dict(zip(COLUMNS, r, strict=True))) else r for r in other['rows']]
        (tmp_path/'renamed.json').write_text(json.dumps(other))
        assert not studies._earlier(tmp_path/'renamed.json', plan(open_study(spec), tmp_path/'more'))
    wrong = (dict(columns=COLUMNS[1:]), dict(rows=1), dict(rows=[1]), dict(rows=[[1, 2]]), dict(rows=[dict.fromkeys(COLUMNS, 1)]),
             dict(folders=[1]), dict(folders=dict(a=1)), dict(folders=dict(a=dict(b=dict(rows=[])))))
    for other in ('[1, 2]', '{"runs": []}', *(json.dumps(dict(columns=COLUMNS, rows=[], folders={}) | w) for w in wrong)):
        (tmp_path/'other.json').write_text(other)
        with pytest.raises(UserError, match='other.json'): study(spec, tmp_path/'less', tmp_path/'other.csv', say=quiet)
        assert (tmp_path/'other.json').read_text() == other


def test_a_switch_of_the_net_shares_the_tokenizer_and_a_changed_recipe_is_a_new_run(whole_study):
    folder, spec, _ = whole_study
    runs = plan(open_study(spec), folder/'runs')
    at = {(t.tokenizer, t.switch, t.net): t.folder for t in runs}
    assert at['ours', '', ''] == at['ours', 'colder', ''] and at['ours', '', 'small'] != at['ours', 'colder', 'small']
    for change in (dict(tokenizer_images=64), dict(precision='bf16'), dict(common={**SPEC['common'], 'tokenizer.batch_size': 16}), dict(seeds=[1])):
        assert not {t.folder for t in plan(open_study(dict(spec, **change)), folder/'runs')} & {*at.values()}, change
    later = {t.folder for t in plan(open_study(dict(spec, net_images=256)), folder/'runs') if t.net}
    assert later.isdisjoint(at.values()) and {t.folder for t in plan(open_study(dict(spec, samples=99, steps=7)), folder/'runs')} == {*at.values()}


def test_a_tokenizer_may_have_overrides_of_its_own(tmp_path):
    own = dict(SPEC['tokenizers'], other=dict(preset='conv-f8d16', **{'tokenizer.stages.*.lr': 5e-4, 'tokenizer.batch_size': 2}))
    runs = {t.tokenizer: t.preset for t in plan(open_study(dict(SPEC, tokenizers=own)), tmp_path) if t.kind == 'tokenizer'}
    assert (runs['other'].batch_size, [s.lr for s in runs['other'].stages]) == (2, [5e-4]) and runs['plain'] == PRESETS['conv-f8d16']
    with pytest.raises(UserError, match='preset'): study(dict(SPEC, tokenizers=dict(a={'tokenizer.batch_size': 2})), tmp_path, say=quiet)
    # a data set's count after the study's and before these
    domain = dict(WORLD, common={'tokenizer.batch_size': 16, 'tokenizer.clip': 2.})
    spec = dict(SPEC, tokenizers=own, common={'tokenizer.batch_size': 8}, data=dict(world=domain))
    assert {t.tokenizer: (t.preset.batch_size, t.preset.clip) for t in plan(open_study(spec), tmp_path) if t.kind == 'tokenizer'} == {
        'plain': (16, 2.), 'ours': (16, 2.), 'other': (2, 2.)}


def test_a_new_measure_alone_is_asked_of_runs_that_are_there(whole_study, monkeypatch):
    folder, spec, table = whole_study
    for k in ('train_tokenizer', 'train_flow'): monkeypatch.setattr(studies, k, None)
    def channels(trial, panel): yield dict(metric='channels', value=load_tokenizer(trial.out).channels, n=1, judge='')
    monkeypatch.setitem(MEASURES, 'channels', ('tokenizer', channels))
    found = study(spec, folder/'runs', say=quiet)
    assert len(found) == len(table)+4 and {r['value'] for r in found.where(metric='channels')} == {16}
    for f in (folder/'runs').glob('*/channels-*.json'): f.unlink()


def test_a_number_is_not_taken_for_that_of_other_images_eyes_or_counts(whole_study, monkeypatch):
    folder, spec, _ = whole_study
    def todo(**change): return {(t.kind, k) for t in plan(open_study(dict(spec, **change)), folder/'runs') for k in t.todo()}
    of = {kind: {(kind, k) for k, (own, _) in MEASURES.items() if own == kind} for kind in ('tokenizer', 'net')}
    assert todo() == set() and todo(samples=32) == todo(steps=3) == of['net']
    for change in (dict(test=dict(path='world', n=40, seed=8)), dict(exam=dict(path='world', n=64, seed=10)), dict(judges=['photo']), dict(references=[])):
        assert todo(data=dict(world=dict(WORLD, **change))) == of['tokenizer'] | of['net'], change
    assert todo(eyes=dict(eye=dict(vfm='tiny'))) == of['tokenizer'] | of['net'] and todo(eyes=dict(SPEC['eyes'], other=dict(vfm='tiny'))) == set()


def test_what_judges_and_references_say_is_kept_and_known_by_its_images(whole_study):
    folder, spec, table = whole_study
    s = open_study(spec)
    panel = lambda **change: Panel(s, build_config(type(s.data['world']), {**asdict(s.data['world']), **change}), 64, folder/'runs'/'seen')
    kept = {p: p.stat().st_mtime_ns for p in (folder/'runs'/'seen').rglob('*') if p.is_file()}
    assert len(kept) == 1+2*6                     # a judge's statistics; a reference's six views, with JSON
    again = panel(test=s.data['world'].test, exam=s.data['world'].exam, train=s.data['world'].train)
    assert len(again.banks) == 6 and again.judges['world'][1].n == 48
    assert kept == {p: p.stat().st_mtime_ns for p in kept}
    other = panel(test=Pictures('world', n=48, seed=9), exam=Pictures('world', n=64, seed=10), train=s.data['world'].train)
    assert other.place('eye', other.exam) != again.place('eye', again.exam) and not other.place('world', other.test).with_suffix('.npz').exists()


def test_a_row_counts_the_images_that_there_were(whole_study):
    _, _, table = whole_study
    assert {r['n'] for r in table.where(net='') if r['metric'].startswith(('psnr', 'rfd', 'viv'))} == {48}
    assert {r['n'] for r in table if r['metric'].startswith('knn_')} == {32} and {r['n'] for r in table if 'cknna' in r['metric']} == {64}


def test_processor_hours_of_every_start_count(tmp_path):
    first = studies._cost(tmp_path, 0.)
    assert studies._cost(tmp_path, .5) > first and len([*tmp_path.glob('cost-*.json')]) == 2      # a second start in one process
    assert studies._cost(tmp_path, .5) < 3*first and len([*tmp_path.glob('cost-*.json')]) == 2    # its later logs


def test_a_run_that_fails_is_named_and_the_others_are_finished(tmp_path):
    # the latent of an RAE is fixed: a KL term has nothing to move
    spec = dict(SPEC, tokenizers=dict(plain='conv-f8d16', rae='rae-photo-f8d192'), common={**SPEC['common'], 'tokenizer.stages.*.weights.kl': 1e-4},
                nets={}, net_images=0, measures=['reconstruction'])
    with pytest.warns(Notice, match='rae.*failed: UserError: stage .* weighs kl'): table = study(spec, tmp_path, say=quiet)
    assert {r['tokenizer'] for r in table} == {'plain'} and (table.runs, table.done) == (2, 1)
    with pytest.warns(Notice), pytest.raises(UserError, match='every run failed, the first by UserError: stage'):
        study(dict(spec, tokenizers=dict(rae='rae-photo-f8d192')), tmp_path, say=quiet)


def test_a_measure_that_breaks_costs_no_training(tmp_path, monkeypatch):
    spec = dict(SPEC, tokenizers=dict(plain='conv-f8d16'), nets={}, net_images=0, measures=['reconstruction'])
    def broken(trial, panel): raise RuntimeError('a disk that is full')
    was = MEASURES['reconstruction']
    monkeypatch.setitem(MEASURES, 'reconstruction', ('tokenizer', broken))
    with pytest.warns(Notice, match='a disk that is full'), pytest.raises(UserError, match='every run failed'): study(spec, tmp_path, say=quiet)
    monkeypatch.setitem(MEASURES, 'reconstruction', was)
    monkeypatch.setattr(studies, 'train_tokenizer', None)
    assert study(spec, tmp_path, say=quiet).done == 1


WORKER = '''
import json, sys, torch
torch.set_num_threads(1)
from vfmvae.studies import study
def say(line): sys.stdout.write(line+'\\n')        # in one piece, as processes share a pipe
t = study(json.loads(sys.argv[1]), sys.argv[2], say=say)
say(f'done {t.done} of {t.runs}')
from vfmvae.runtime import finish_distributed
finish_distributed()
'''


def begun(text): return [line.split(':')[0] for line in text.splitlines() if ': begins' in line]


@pytest.mark.thorough
def test_two_workers_share_the_runs_of_one_folder(tmp_path):
    spec = json.dumps(dict(SPEC, tokenizers=dict(plain='conv-f8d16'), seeds=[0, 1, 2, 3], nets={}, net_images=0, measures=['reconstruction']))
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    start = [sys.executable, '-c', WORKER, spec, str(tmp_path)]
    both = [subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    said = [p.communicate(timeout=300) for p in both]
    assert [p.returncode for p in both] == [0, 0], said[0][1][-1500:]+said[1][1][-1500:]
    runs = [begun(out) for out, _ in said]
    assert len(runs[0]+runs[1]) == len({*runs[0], *runs[1]}) == 4 and all('done 4 of 4' in out for out, _ in said)


def test_a_run_that_another_worker_holds_is_left_to_it(tmp_path):
    s = open_study(dict(SPEC, nets={}, net_images=0, measures=['reconstruction']))
    first, second = plan(s, tmp_path)
    first.folder.mkdir(parents=True)
    with FileLock(first.folder/'lock'):
        name, lock = studies._next([first, second], {})
        assert name == second.folder.name
        lock.release()
        assert studies._next([first], {}) == ('', None)
    assert studies._next([first], {first.folder.name: 'why'}) == (None, None)


def test_a_group_of_processes_trains_each_run_together(tmp_path):
    from test_train import launch
    (tmp_path/'script.py').write_text(WORKER)
    spec = json.dumps(dict(SPEC, tokenizers=dict(plain='conv-f8d16'), measures=['reconstruction', 'finish'], compile=False))
    done = launch(2, tmp_path/'script.py', spec, str(tmp_path/'runs'))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len({*begun(done.stdout)}) == 2 and done.stdout.count('done 2 of 2') == 2
    assert {json.loads(f.read_text())['made']['commit'] for f in (tmp_path/'runs').glob('*/trained.json')}


def test_what_it_would_cost_trains_nothing(tmp_path):
    said = []
    rows = study(SPEC, tmp_path/'runs', dry_run=True, say=said.append)
    assert len(rows) == 4 and all(r['hours'] > 0 and r['gb'] > 0 for r in rows) and not (tmp_path/'runs').exists()
    assert said[-1].startswith('4 runs: ') and 'GB' in said[-1]


def test_a_net_with_a_class_token_has_a_price(tmp_path):
    reg = {'net.net.encoder_depth': 1, 'net.net.cls_dim': 128, 'net.net.z_dims': [128],
           'net.vfms': ['tiny'], 'net.flow.weights': dict(flow=1., repa=.5, cls=.03)}
    spec = dict(SPEC, tokenizers=dict(plain='conv-f8d16'), switches={'reg': reg})
    assert [r['hours'] > 0 for r in study(spec, tmp_path/'runs', dry_run=True, say=quiet)] == [True, True]


@pytest.mark.parametrize('steps, moments', [(1, 8), (5, 3), (10, 8), (23, 8), (24, 8), (750, 8), (3003, 8), (63, 7)])
def test_no_moment_is_dropped_before_it_is_judged(steps, moments, tmp_path, monkeypatch):
    how, tok = {}, SimpleNamespace(stride=8, channels=16, name='plain')
    monkeypatch.setattr(studies, 'trained_tokenizer', lambda trial: tok)
    monkeypatch.setattr(studies, 'cache_latents', lambda *a, **k: None)
    monkeypatch.setattr(studies, 'train_flow', lambda *a, **k: how.update(k))
    spec = dict(SPEC, tokenizers=dict(plain='conv-f8d16'), net_images=64*steps, moments=moments)
    trial = next(t for t in plan(open_study(spec), tmp_path) if t.net)
    trial.folder.mkdir(parents=True)
    studies.train_trial(trial)
    saved = [s for s in range(1, steps+1) if s % how['save_every'] == 0 or s == steps]       # as `fit` saves
    assert len(saved) <= how['keep'] == moments+1 and len(saved) >= min(steps, moments/2)


@pytest.mark.parametrize('file', sorted((ROOT/'data'/'studies').glob('*.json')), ids=lambda f: f.stem)
def test_every_run_of_our_studies_can_be_built(file, tmp_path, monkeypatch):
    monkeypatch.setenv('VFMVAE_DINO_FOCUS', 'nowhere')
    s, seen = open_study(file), set()
    for t in plan(s, tmp_path):
        if t.seed != s.seeds[0] or t.folder in seen: continue
        seen.add(t.folder)
        if t.kind == 'net': DiT(t.preset.net)
        else:
            stages = schedule_stages(t.preset, s.tokenizer_images, None, None, t.preset.batch_size)
            name = s.data[t.dataset].vfm if t.preset.config.vfm else None
            model, _, _ = build_training(t.preset, stages, VFM(s.eyes[name].vfm, False) if name in s.eyes else name)      # with random weights
            for stage in stages: check_stage(model, stage)
            # whole batches in each stage; what a study quotes is exact
            assert 0 <= s.tokenizer_images - sum(x.num_images for x in stages) < (24 if file.stem == "search" else 1) and model.config.img_size == 64
    assert len(seen) > 3


# recipes as data -----------------------------------------------------------------------------------------------------------------------------------

def test_an_override_changes_what_it_names_alone():
    p = PRESETS['vfmvae-photo-f8d16']
    q = override(p, 'stages.*.weights.vf', 0.)
    assert [s.weights.get('vf') for s in q.stages] == [0.]*3 and [{**s.weights, 'vf': 0.} for s in p.stages] == [dict(s.weights) for s in q.stages]
    q = override(p, 'stages.weak.equivariance', [.5, 1.])
    assert [s.equivariance for s in q.stages] == [(), (.5, 1.), ()] and asdict(q.config) == asdict(p.config)
    assert override(p, 'config.channels', 8).config.channels == 8 and p.config.channels == 16
    assert override(p, 'batch_size', 4).batch_size == 4


@pytest.mark.parametrize('path, said', [('stages.strange.lr', "no stage named 'strange'"), ('config.chanels', 'channels'), ('colour', 'no field of a Preset'),
                                        ('stages.*.lr', 'lr')])
def test_an_override_of_nothing_is_refused(path, said):
    with pytest.raises(UserError, match=said): override(PRESETS['vfmvae-photo-f8d16'], path, -1)


@pytest.mark.parametrize('change, said', [
    (dict(sede=[0]), "'sede'.*seeds"), (dict(measures=['fid']), "no measure named 'fid'"), (dict(net_images=0), 'give net_images'),
    (dict(data=dict(world=dict(WORLD, judges=['inceptoin']))), "no judge named 'inceptoin'"),
    (dict(data=dict(world=dict(WORLD, references=['clip']))), "no eye named 'clip'"),
    (dict(data=dict(world=dict(WORLD, train=dict(pth='world')))), "'pth'.*path"), (dict(samples=0), 'samples'),
    (dict(tokenizers=dict(a='conv-f8d17')), 'conv-f8d16'), (dict(switches={'': {}, 'x': {'tokeniser.config.channels': 8}}), "part of a switch.*tokenizer"),
    (dict(eyes=dict(eye=dict(vfm='photo'), world=dict(vfm='tiny'))), "'world' hides the bundled judge"),
    (dict(switches={'x': 3}), "'x' in switches is 3"), (dict(tokenizers=dict(a=3)), "'a' in tokenizers is 3"),
    (dict(tokenizers=dict(a={'preset': 'conv-f8d16', 'joint.weights.repa': 1.})), "no part of a tokenizer named 'joint'"),
    (dict(switches={'': {}, 'x': {'tokenizer.stages.*.noise.scale': 1.}}), "has no 'scale'"), (dict(common={'tokenizer.config.channels.x': 1}), "has no 'x'"),
    (dict(common={'tokenizer.stages.*.weights.vf.x': 1}), "has no 'x'"), (dict(data={}), 'no data'), (dict(tokenizers={}), 'no tokenizers')])
def test_what_a_study_says_wrongly_is_refused_before_anything_is_trained(change, said, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, 'train_tokenizer', None)
    with pytest.raises(UserError, match=said): study(dict(SPEC, **change), tmp_path, say=quiet)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"data": {"a": {}}}', '{"data": 3}', '{"data": {"a": []}}', '{"seeds": "0"}', '\x00'])
def test_a_file_that_is_no_study_is_refused_in_one_line(text, tmp_path):
    (file := tmp_path/'s.json').write_text(text)
    with pytest.raises(UserError) as e: study(file, say=quiet)
    assert '\n' not in str(e.value) and 'positional' not in str(e.value)
