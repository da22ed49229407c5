"""Ray on this machine: two processors, no dashboard, the loopback address."""

import pytest

from tests.datasets.jobs_of_tests import ENVIRONMENT


@pytest.fixture(scope="session")
def ray():
    """Ray, which starts with the first test that uses it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        ray.init(
            num_cpus=2,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            object_store_memory=100 << 20,
            logging_level="ERROR",
            log_to_driver=False,
            runtime_env={"env_vars": ENVIRONMENT},
        )
        yield ray
        ray.shutdown()
