"""On a GPU: what `overlap="stream"` promises, and that a step never makes the host wait.

Without one these are skipped, and said to be. The protocol itself is checked everywhere, by the
recording guard of `tests/cpp/side_stream_test.cpp`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import pyctrlora
from pyctrlora import CTROptimizer

FOUND = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
DEVICE = FOUND or torch.device("cpu")
BENCH = Path(__file__).parents[2] / "bench" / "python" / "bench_step.py"

# A machine without an accelerator has nothing to run these on; the summary names them (-rs).
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(FOUND is None, reason="no accelerator: streams were not run on a device"),
]


def run(net: Any, batches: Any, train: Any, device: torch.device, **options: Any) -> Any:
    """Products of a run of 40 steps on `device`."""
    model = net("own").to(device)
    opt = CTROptimizer(model.parameters(), lr=0.05, factor_every=3, **options)
    losses = train(model, opt, [(x.to(device), y.to(device)) for x, y in batches(40)])
    assert losses[-1] < losses[0]
    return {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ({"overlap": "inline"}, {"overlap": "inline"}),
        ({"overlap": "stream", "max_staleness": 0}, {"overlap": "inline"}),
        ({"overlap": "stream", "max_staleness": 1}, {"overlap": "thread", "max_staleness": 1}),
    ],
    ids=["inline", "stream", "stale"],
)
def test_the_device_trains_as_the_cpu(net, batches, train, here, there):
    """Float64, so that another order of sums is all there is between them."""
    own = run(net, batches, train, DEVICE, **here)
    expected = run(net, batches, train, torch.device("cpu"), **there)
    for name, tensor in expected.items():
        torch.testing.assert_close(own[name], tensor, rtol=1e-6, atol=1e-8)


class Wide(nn.Module):
    """Enough work on the device that kernels of two streams can meet."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(12)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def wide() -> tuple[nn.Module, CTROptimizer, Any]:
    torch.manual_seed(0)
    model = Wide()
    pyctrlora.add_lora(model, rank=16, targets=[f"layers.{i}" for i in range(12)])
    model.to(DEVICE)
    opt = CTROptimizer.from_model(model, lr=0.05, factor_every=3, overlap="stream")
    x = torch.randn(4096, 1024, device=DEVICE)

    def step() -> None:
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()

    for _ in range(8):  # past the steps that observe every layer
        step()
    torch.accelerator.synchronize()
    return model, opt, step


def test_refreshes_run_beside_the_backward(tmp_path):
    _, _, step = wide()
    kinds = {"cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}
    with profile(activities=[ProfilerActivity.CPU, kinds[DEVICE.type]]) as trace:
        for _ in range(6):
            step()
        torch.accelerator.synchronize()
    trace.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    streams: dict[int, list[tuple[float, float]]] = {}
    for event in events:
        if event.get("cat") == "kernel":
            span = (event["ts"], event["ts"] + event["dur"])
            streams.setdefault(event["args"]["stream"], []).append(span)
    main = max(streams, key=lambda s: len(streams[s]))
    side = [span for stream, spans in streams.items() if stream != main for span in spans]
    assert side, "no kernel ran on a side stream"
    meet = [s for s in side if any(s[0] < end and begin < s[1] for begin, end in streams[main])]
    assert meet, "no kernel of the side stream ran while one of the caller's did"


# torch has this switch for CUDA alone: elsewhere the test could not fail.
@pytest.mark.skipif(DEVICE.type != "cuda", reason="only CUDA tells of synchronisations")
def test_a_step_never_makes_the_host_wait():
    model, opt, _ = wide()
    x = torch.randn(4096, 1024, device=DEVICE)
    for _ in range(3):
        opt.zero_grad()
        model(x).square().mean().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_bench_of_the_step_runs_on_the_device(tmp_path):
    command = [sys.executable, str(BENCH), "--device", DEVICE.type, "--rounds", "8"]
    command += ["--training-rounds", "2", "--out", str(tmp_path / "step.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "step.json").read_text())
    assert found["device"] == DEVICE.type
    print({name: found["step"][f"{name}_to_adamw"] for name in ("plain", "thirds", "default")})
    assert found["step"]["default_to_adamw"]["median"] > 0
