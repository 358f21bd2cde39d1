"""How torch is set up for a run."""

import subprocess
import sys

import pytest

FAULTS = """
import resource
import statistics
import torch
from safe_offrl.agents.cql import ConservativeCritics, CQLConfig
from safe_offrl.compute.device import configure
from safe_offrl.policies.networks import NetworkConfig, Networks
from safe_offrl.types import Layout

configure(1)
layout, generator = Layout(60, 2), torch.Generator().manual_seed(0)
networks = Networks(*layout.sizes, NetworkConfig((256, 256), (256, 256), 2), generator)
agent = ConservativeCritics(networks, CQLConfig(), calibrated=False)
batch = layout.unpack(torch.rand(256, layout.width, generator=generator))
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    agent.update(batch, generator)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(statistics.median(faults[3:])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_an_update_finds_the_memory_of_the_one_before() -> None:
    # By default the temporaries of one CQL update (130 MB) are given back: 33,000 faults in each.
    # The median of five counts, since a busy system may take idle pages away in one of them.
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 3000
