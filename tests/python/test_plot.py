"""Pictures are written, and what is missing is named."""

from __future__ import annotations

import pytest

from pyctrlora import CTROptimizer, plot

pytest.importorskip("matplotlib")


@pytest.fixture
def report(net, batches, train):
    model = net("own", rank=4)
    opt = CTROptimizer(model.parameters(), rank_budget=0.5, total_steps=200, rank_start="full")
    for batch in batches(70):
        opt.record(train(model, opt, [batch])[0])
    return opt.report()


def test_pictures_are_written(report, tmp_path):
    for name in ("training", "ranks", "budget"):
        path = tmp_path / f"{name}.png"
        getattr(plot, name)(report, path)
        assert path.read_bytes().startswith(b"\x89PNG")
    plot.spectra({"x": [3.0, 1.0], "y": [2.0]}, tmp_path / "spectra.svg", {"x": 0.5})
    assert "<svg" in (tmp_path / "spectra.svg").read_text()
    assert len(report["training"]["loss"]) == 70
    assert report["training"]["steps"] == list(range(1, 71))


def test_what_is_missing_is_named(net, tmp_path):
    empty = CTROptimizer(net("own").parameters()).report()
    for name in ("training", "ranks", "budget"):
        with pytest.raises(ValueError, match=rf"plot\.{name}\] expected"):
            getattr(plot, name)(empty, tmp_path / "x.png")
    with pytest.raises(ValueError, match="expected spectra"):
        plot.spectra({}, tmp_path / "x.png")
