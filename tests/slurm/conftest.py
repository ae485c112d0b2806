"""One cluster for all tests of this folder."""

import pytest

import slurm_cluster


@pytest.fixture(scope="session")
def cluster():
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    with slurm_cluster.cluster() as running:
        yield running
