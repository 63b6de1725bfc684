"""Models of Lightning and Hugging Face on a GPU: replayed steps have the losses of eager ones, and can be replayed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning", reason="lightning is not installed: pip install 'ray-orchestrator[lightning]'")
pytest.importorskip("transformers", reason="transformers is not installed: pip install 'ray-orchestrator[huggingface]'")

from orchestrator.train.groups import Ranks
from orchestrator.train.step_mode.choice import StepMode
from tests.unit.jobs.test_ready_made import REPLAYABLE, stepper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
    pytest.mark.timeout(180),
]


@pytest.mark.parametrize(("job", "params", "metric"), REPLAYABLE)
def test_replayed_steps_of_library_models_are_those_of_eager_ones(
    tmp_path: Path, job: str, params: dict[str, Any], metric: str
) -> None:
    eager_ranks = Ranks(rank=0, world_size=1, device=torch.device("cuda"), step_mode=StepMode.EAGER)
    graph_ranks = replace(eager_ranks, step_mode=StepMode.GRAPH)
    graph = stepper(tmp_path, job, params, metric, ranks=graph_ranks, micro_batch=8, samples=64)
    found = [result for _ in range(24) for result in graph.advance()] + graph.settle()
    assert {result.mode for result in found[1:]} == {StepMode.GRAPH}, graph.mode_words
    eager = stepper(tmp_path, job, params, metric, ranks=eager_ranks, micro_batch=8, samples=64)
    wanted = [eager.step() for _ in found]
    assert [result.loss for result in found] == pytest.approx([result.loss for result in wanted], rel=1e-4)
    assert graph.evaluate()[metric] == pytest.approx(eager.evaluate()[metric], rel=1e-3)
