"How much is asked: `make test` asks each question of one member of each kind, `make test-all` (VFMVAE_TEST_ALL=1) of all of them."
import os

ALL = os.environ.get('VFMVAE_TEST_ALL', '') not in ('', '0')


def thorough(values, keep):
    "Parameters of which those that are not in `keep` are for `make test-all`."
    import pytest
    assert {*keep} <= {*values}, keep
    return [v if v in keep else pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.thorough) for v in values]
