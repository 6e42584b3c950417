"""`compile = true` in a grid: what is compiled, and what is refused before anything is trained.
Where torch compiles here, PyTorch's own operations are the code, which is quick."""

from __future__ import annotations

import signal

import pytest
import torch

from hpc.command import UserError
from hpc.preempt import STOP_SIGNALS
from jobs import compiled_network, pretrain
from jobs import train as job
from jobs.compiled_network import require_compiler, training_form, while_compiling
from jobs.protocol import Protocol
from tests.jobs.cells import a_cell, a_share
from tests.jobs.compilers import alone, compile_into, no_compiler, num_compiled, without_compiler
from tests.jobs.ranks import on_ranks
from tests.jobs.small_runs import assert_same, grid_of, results, task_of
from tests.jobs.test_trainee import TOTAL, assert_equal_states, trainee_of

pytestmark = pytest.mark.usefixtures("one_thread")

LOSSES = ("WCE", "WDLNWCE")
DEEPLAB = "deeplabv3_mobilenet_v3_large"
CPU = torch.device("cpu")


def beyond_the_limit():
    """What a network does that is called with more shapes than torch has codes for."""
    torch.compile = without_inductor
    form = training_form(torch.nn.ReLU(), Protocol(compile=True))
    with torch._dynamo.config.patch(recompile_limit=2):
        for size in (1, 2):
            form(torch.zeros(size, 3))
        try:
            form(torch.zeros(3, 3))
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            return "refuses"
    return "goes on"


def test_inputs_of_another_shape_are_not_taken_for_the_same():
    """One shape, one code; and beyond torch's limit of codes an error, not the plain network."""
    assert alone(beyond_the_limit) == "refuses"


def without_inductor(plain, options, compile=torch.compile, **how):
    """`torch.compile` up to its graph, which PyTorch's own operations then run: the same bits."""
    return compile(plain, backend="eager", **how)


def test_a_job_compiles_its_heads_and_their_backbone(streets, tmp_path, monkeypatch):
    """For its threads, numbers laid out as we lay them out, and with stops kept from compilers."""
    found, kept_away = [], []

    def compiler(graph, inputs):
        kept_away.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()).issuperset(STOP_SIGNALS))
        return graph

    def noted(plain, options, compile=torch.compile, **how):
        found.append(type(plain).__name__)
        assert options["cpp.threads"] == 1 and not options["layout_optimization"]
        assert not torch._dynamo.config.optimize_ddp
        return compile(plain, backend=compiler, **how)

    monkeypatch.setattr(torch, "compile", noted)
    compile_into(monkeypatch, tmp_path / "compiled")
    trained = []
    for compile in (False, True):
        grid = grid_of(
            tmp_path / str(compile), streets.folder, *LOSSES,
            epochs=1, compile=compile,
        )  # fmt: skip
        assert job.main([str(task_of(grid))]) == 0
        trained.append(results(grid.run))
    assert found == ["function", "FCNHead", "FCNHead", "Backbone"]
    assert len(kept_away) >= 3 and all(kept_away)
    plain, compiled = trained
    assert plain.keys() == compiled.keys() != set()
    for name, result in plain.items():
        assert_same(result, compiled[name])


def trained(group, compile):
    """The state of a head after two steps on this rank."""
    torch.compile = without_inductor
    trainee = trainee_of(a_cell("WDLWCE", DEEPLAB, threads=1, compile=compile), group)
    for step in range(2):
        trainee.step(*a_share(step, group.rank, group.world_size, images=4), step, TOTAL)
    assert num_compiled() == int(compile)
    return trainee.state()


def test_on_two_ranks_what_they_exchange_is_compiled_too(tmp_path):
    """Batch norm's statistics are those of all ranks, and the bits those of the plain network."""
    folders = [tmp_path / "plain", tmp_path / "compiled"]
    for folder in folders:
        folder.mkdir()
    plain, compiled = (on_ranks(2, f, trained, f.name == "compiled") for f in folders)
    for head, expected in zip(compiled, plain, strict=True):
        assert_equal_states(head, expected)


@pytest.mark.parametrize(("kind", "main"), [("bundle", job.main), ("pretrain", pretrain.main)])
def test_without_a_compiler_nothing_is_trained(streets, tmp_path, kind, main):
    grid = grid_of(tmp_path, streets.folder, "CE", epochs=1, compile=True)
    with pytest.raises(UserError) as refused:
        alone(without_compiler, tmp_path / "compiled", main, [str(task_of(grid, kind=kind))])
    said = str(refused.value)
    assert said.startswith("compile = true does not work here (")
    assert "no-such-compiler" in said and "\n" not in said
    assert said.endswith(
        "; see that the nodes have g++ and Python's headers (setup in the profile), or set "
        "compile = false in [protocol]"
    )
    assert not any(path.is_file() for path in grid.run.checkpoints("").rglob("*"))


def a_compiled_step():
    protocol = Protocol(compile=True)
    with while_compiling(protocol):
        training_form(torch.nn.Softplus(), protocol)(torch.zeros(2, 3))


def test_a_compiler_that_fails_later_ends_a_job_in_one_line(tmp_path):
    """On a disk that has become full, for instance."""
    with pytest.raises(UserError) as refused:
        alone(without_compiler, tmp_path / "compiled", a_compiled_step)
    said = str(refused.value)
    assert said.startswith("torch.compile failed (") and "no-such-compiler" in said
    assert "go on from the last checkpoint" in said and "\n" not in said


def test_on_a_gpu_code_that_must_not_vary_takes_a_torch_that_keeps_its_choices(monkeypatch):
    monkeypatch.setattr(torch._inductor, "list_options", lambda: ["cpp.threads"])
    with pytest.raises(UserError, match="with deterministic = true needs a torch later than"):
        require_compiler(Protocol(compile=True, deterministic=True), torch.device("cuda"))


def test_ranks_that_would_have_unequal_shares_are_refused():
    """With one rank that had no image at all two waited for each other for ever."""
    require_compiler(Protocol(batch_size=3), CPU, ranks=2)
    with pytest.raises(UserError, match=r"= 3 in \[protocol\] is no multiple of a job's 2 ranks;"):
        require_compiler(Protocol(batch_size=3, compile=True), CPU, ranks=2)
    Protocol(batch_size=4, compile=True, weights="pretrain").require_even_shares(2)
    with pytest.raises(UserError, match=r"= 8 in \[protocol.pretrain\] is no multiple"):
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
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "set by this test, so that it is restored")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    compiled_network.keep_privately()
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("lossgrid-compiled-")
    assert folder.stat().st_mode & 0o777 == 0o700
