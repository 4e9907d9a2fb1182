"Laws of the files: whole or absent, whoever else writes them."
import importlib, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import pytest
from vfmvae.core import numbers, Registry, rows
from vfmvae.files import write_atomic


def test_threads_that_write_the_same_file_leave_a_whole_one_that_all_may_read(tmp_path):
    want = {i: bytes([i])*200_000 for i in range(8)}
    meet = threading.Barrier(8)
    def write(i):
        def slowly(tmp):
            with open(tmp, 'wb') as f:
                for j in range(0, 200_000, 50_000):
                    f.write(want[i][j:j+50_000])
                    f.flush()
                    time.sleep(.001)
            tmp.chmod(0o600)
        meet.wait()
        write_atomic(tmp_path/'deep/x', slowly)
    before = os.umask(0o027)
    try:
        for _ in range(5):
            with ThreadPoolExecutor(8) as pool: [*pool.map(write, range(8))]
            assert (tmp_path/'deep/x').read_bytes() in want.values() and os.listdir(tmp_path/'deep') == ['x']
        assert (tmp_path/'deep/x').stat().st_mode & 0o777 == 0o640
        assert os.umask(0o027) == 0o027
    finally: os.umask(before)


@pytest.mark.parametrize('start', ['ask', 'import'])          # a registry is asked, or its module is imported, while others ask
def test_threads_that_ask_a_registry_first_all_find_what_is_registered(start, tmp_path, monkeypatch):
    (tmp_path/'slow_zoo.py').write_text('import time\nfrom zoo_registry import zoo\nfor name in "abc":\n    time.sleep(.05)\n    assert name not in zoo\n'
                                        '    zoo.register(name, lambda n=name: n)\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    zoo = Registry('animal', modules=('slow_zoo',))
    monkeypatch.setitem(sys.modules, 'zoo_registry', type(sys)('zoo_registry'))
    sys.modules['zoo_registry'].zoo = zoo
    sys.modules.pop('slow_zoo', None)
    meet = threading.Barrier(6)
    def look(i):
        meet.wait()
        if start == 'import' and not i: importlib.import_module('slow_zoo')
        time.sleep(.02*i)
        return zoo['abc'[i % 3]], sorted(zoo)
    with ThreadPoolExecutor(6) as pool: found = [*pool.map(look, range(6))]
    assert found == [('abc'[i % 3], ['a', 'b', 'c']) for i in range(6)]


@pytest.mark.parametrize('view', [lambda a: a[::-1], lambda a: a[:, ::-2], lambda a: a.astype('>f4'), lambda a: a.astype('>f8')[::-1],
                                  lambda a: a.astype(np.longdouble), lambda a: (a*9).astype('>i4'), lambda a: np.asfortranarray(a), lambda a: a.T])
def test_views_and_foreign_byte_orders_are_the_numbers_they_hold(view):
    a = view(np.random.default_rng(3).standard_normal((6, 4)))
    assert np.array_equal(numbers(a).numpy().astype(float), np.asarray(a, float)) and np.allclose(rows(a).numpy(), np.asarray(a, float), atol=1e-6)
