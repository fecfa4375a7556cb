"""TensorBoard's and MLflow's copies of the records, read back with their own readers."""

import re
import sys

import pytest
from bench.tests import tiny
from bench.tests.commands import call
from bench.tests.test_results import MATRICES, SETTINGS, write

from memsyn_bench.pages.export import _metric_name
from memsyn_bench.running.record import RESULTS_FILE
from memsyn_bench.sequences.sequences import SEQUENCES

NAMES = ["one", "two <b>/../x"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(SEQUENCES.entries, "tiny", tiny.SEQUENCE)
    found = {"mas": MATRICES["mas"], "../up": {0: [[70.0]]}}
    write(tmp_path / "first" / RESULTS_FILE, found, num_tasks=2, names=NAMES, scores={"class-incremental": {
        "mas": {seed: [(50.0,), (30.0, 40.0)] for seed in range(3)}, "../up": {0: [(10.0,)]},
    }})  # fmt: skip
    return tmp_path / "first"


def test_tensorboard_reads_every_number_back(folder, tmp_path):
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard: memsyn-bench[tensorboard]"
    )
    out = tmp_path / "tb"
    call("report", folder, "--tensorboard", out)
    assert {path.name for path in (out / "first").iterdir()} == {
        "mas-seed0",
        "mas-seed1",
        "mas-seed2",
        "%2E%2E%2Fup-seed0",
    }
    found = reader.EventAccumulator(str(out / "first" / "mas-seed1"))
    found.Reload()

    def scalars(name):
        return [(event.step, event.value) for event in found.Scalars(name)]

    assert scalars("accuracy/one") == [(1, 82.0), (2, 83.0)]
    assert scalars("accuracy/two <b>/../x") == [(2, 85.0)]
    assert scalars("average accuracy") == [(1, 82.0), (2, 84.0)]
    assert scalars("forgetting") == [(1, 0.0), (2, -1.0)]
    assert scalars("class-incremental/mean") == [(1, 50.0), (2, 35.0)]
    assert scalars("kept_bytes") == [(1, 100.0), (2, 2500.0)]
    said = call("report", folder, "--tensorboard", out, code=1).stderr
    assert "is there already, and would hold everything twice. Name another folder." in " ".join(said.split())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_mlflow_reads_every_number_back(folder, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow: memsyn-bench[mlflow]")
    pytest.importorskip("sqlalchemy", reason="needs sqlalchemy: memsyn-bench[mlflow]")
    uri = f"sqlite:///{tmp_path / 'm.db'}"
    call("report", folder, "--mlflow", uri)
    client = mlflow.MlflowClient(uri, registry_uri=uri)
    experiment = client.get_experiment_by_name("memsyn first")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"mas seed 0", "mas seed 1", "mas seed 2", "../up seed 0"}
    run = runs["mas seed 1"]
    assert run.info.status == "FINISHED"
    expected = {"method": "mas", "seed": "1", "sequence": "tiny", "lr": str(SETTINGS.lr), "applied_strength": "1.0"}
    assert expected.items() <= run.data.params.items()

    def metric(name):
        return [(found.step, found.value) for found in client.get_metric_history(run.info.run_id, name)]

    assert metric("accuracy/one") == [(1, 82.0), (2, 83.0)]
    assert metric("accuracy/two _b_____x") == [(2, 85.0)]
    assert client.get_metric_history(run.info.run_id, "loss")[0].timestamp > 1e12  # milliseconds since 1970
    assert metric("average accuracy") == [(1, 82.0), (2, 84.0)]
    assert metric("class-incremental/mean") == [(1, 50.0), (2, 35.0)]
    said = call("report", folder, "--mlflow", uri, code=1).stderr
    assert "has runs of 'memsyn first' already, and would hold everything twice." in " ".join(said.split())
    assert len(client.search_runs([experiment.experiment_id])) == 4


def test_names_that_mlflow_cannot_tell_apart_stay_apart():
    taken = {}
    names = [_metric_name(text, taken) for text in ("accuracy/a+b", "accuracy/a?b", "accuracy/a+b", "accuracy/a_b")]
    assert names == ["accuracy/a_b", "accuracy/a_b_", "accuracy/a_b", "accuracy/a_b__"]


def test_mlflows_refusal_is_an_error_of_ours(folder):
    pytest.importorskip("mlflow", reason="needs mlflow: memsyn-bench[mlflow]")
    said = call("report", folder, "--mlflow", "nonsense://x", code=1).stderr
    assert "MLflow at nonsense://x refuses: " in said


@pytest.mark.parametrize("package", ["tensorboard", "mlflow"])
def test_a_missing_package_is_named_with_its_extra(folder, tmp_path, monkeypatch, package):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    said = call("report", folder, f"--{package}", tmp_path / "out", code=1).stderr
    assert re.search(rf"--{package} needs {package} \(.*\): pip install 'memsyn-bench\[{package}\]'\.", said)
