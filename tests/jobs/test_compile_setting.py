"""`compile = true` in a grid: what is compiled, and what is refused before anything is trained.
Where torch compiles here, PyTorch's own operations are the code, which is quick."""

from __future__ import annotations

import pytest
import torch

from hpc.command import UserError
from jobs import compiled_network, pretrain
from jobs import train as job
from jobs.compiled_network import require_compiler, training_form
from jobs.protocol import Protocol
from tests.jobs.compilers import compile_into, no_compiler
from tests.jobs.small_runs import assert_same, grid_of, results, task_of

pytestmark = pytest.mark.usefixtures("one_thread")

LOSSES = ("WCE", "WDLNWCE")
CPU = torch.device("cpu")


def test_inputs_of_another_shape_are_not_taken_for_the_same(monkeypatch):
    """One shape, one code; and beyond torch's limit of codes an error, not the plain network."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled_network, "_compiled", without_inductor)
    form = training_form(torch.nn.ReLU(), Protocol(compile=True))
    with torch._dynamo.config.patch(recompile_limit=2):
        for size in (1, 2):
            form(torch.zeros(size, 3))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            form(torch.zeros(3, 3))


def without_inductor(plain, _protocol):
    """As torch.compile takes it up, but run with PyTorch's own operations: the same bits."""
    return torch.compile(plain, backend="eager", fullgraph=True, dynamic=False)


@pytest.mark.parametrize("train_what", ["head", "all"])
def test_a_job_compiles_what_it_trains_and_its_backbone(streets, tmp_path, monkeypatch, train_what):
    found = []

    def noted(plain, protocol):
        found.append(type(plain).__name__)
        return without_inductor(plain, protocol)

    monkeypatch.setattr(compiled_network, "_compiled", noted)
    compile_into(monkeypatch, tmp_path / "compiled")
    trained = []
    for compile in (False, True):
        grid = grid_of(
            tmp_path / str(compile), streets.folder, *LOSSES,
            train=train_what, epochs=1, compile=compile,
        )  # fmt: skip
        cells = grid.cells[:1] if train_what == "all" else grid.cells
        assert job.main([str(task_of(grid, cells))]) == 0
        trained.append(results(grid.run))
    networks = ["Network"] if train_what == "all" else ["FCNHead", "FCNHead", "Backbone"]
    assert found == ["function", *networks]
    plain, compiled = trained
    assert plain.keys() == compiled.keys() != set()
    for name, result in plain.items():
        assert_same(result, compiled[name])


@pytest.mark.parametrize(("kind", "main"), [("bundle", job.main), ("pretrain", pretrain.main)])
def test_without_a_compiler_nothing_is_trained(streets, tmp_path, monkeypatch, kind, main):
    grid = grid_of(tmp_path, streets.folder, "CE", epochs=1, compile=True)
    with no_compiler(monkeypatch, tmp_path / "compiled"), pytest.raises(UserError) as refused:
        main([str(task_of(grid, kind=kind))])
    said = str(refused.value)
    assert said.startswith("compile = true does not work here (")
    assert "no-such-compiler" in said and "\n" not in said
    assert said.endswith(
        "; see that the nodes have g++ and Python's headers (setup in the profile), or set "
        "compile = false in [protocol]"
    )
    assert not any(path.is_file() for path in grid.run.checkpoints("").rglob("*"))


def test_ranks_that_would_have_unequal_shares_are_refused():
    """With one rank that had no image at all two waited for each other for ever."""
    require_compiler(Protocol(batch_size=3), CPU, ranks=2)
    with pytest.raises(UserError, match=r"3 images are not the same for each of 2; choose a mult"):
        require_compiler(Protocol(batch_size=3, compile=True), CPU, ranks=2)
    Protocol(batch_size=4, compile=True, weights="pretrain").require_even_shares(2)
    with pytest.raises(UserError, match=r"a multiple of 3 as batch_size in \[protocol.pretrain\]"):
        Protocol(batch_size=12, compile=True, weights="pretrain").require_even_shares(3)


def test_who_does_not_compile_needs_no_compiler(tmp_path, monkeypatch):
    with no_compiler(monkeypatch, tmp_path / "compiled"):
        require_compiler(Protocol(), CPU)
    assert not (tmp_path / "compiled").exists()


def test_what_is_compiled_is_not_kept_where_others_can_write(tmp_path, monkeypatch):
    """It is run by the next job."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(shared / "compiled"))
    with pytest.raises(UserError, match="set TORCHINDUCTOR_CACHE_DIR to a folder of yours on the"):
        require_compiler(Protocol(compile=True), CPU)


def test_by_default_it_is_kept_in_a_folder_of_the_node(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    compiled_network.keep_privately()
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("lossgrid-compiled-")
    assert folder.stat().st_mode & 0o777 == 0o700
