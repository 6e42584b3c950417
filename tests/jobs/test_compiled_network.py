"""`compile = true`: other code for the networks, and the same promises."""

from __future__ import annotations

import copy

import pytest
import torch

from hpc.command import UserError
from hpc.env import RankEnv
from hpc.groups import process_group
from jobs import compiled_network, pretrain
from jobs import train as job
from jobs.compiled_network import require_compiler, training_form
from jobs.protocol import Protocol
from jobs.trainee import step_in_turn
from tests.jobs.cells import a_cell, a_share
from tests.jobs.compilers import compile_into, num_compiled, take_compiler_away
from tests.jobs.small_runs import assert_same, grid_of, results, task_of
from tests.jobs.test_trainee import TOTAL, assert_equal_states, trainee_of, weights

pytestmark = pytest.mark.usefixtures("one_thread")

LOSSES = ("WCE", "WDLNWCE")
STEPS = 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A process group of one rank, for which torch compiles, from nothing."""
    env = RankEnv("single", 0, 1, 0, node="here", job_id="", start_id="")
    with pytest.MonkeyPatch.context() as patch:
        compile_into(patch, tmp_path_factory.mktemp("compiled"))
        with process_group(env, tmp_path_factory.mktemp("rendezvous")) as group:
            yield group


def trainees_of(group, losses, compile):
    return [trainee_of(a_cell(loss, threads=1, compile=compile), group) for loss in losses]


def train(trainees, steps):
    """The state of each after each step."""
    states = []
    for step in steps:
        step_in_turn(trainees, *a_share(step), step, TOTAL)
        states.append(copy.deepcopy([trainee.state() for trainee in trainees]))
    return states


@pytest.fixture(scope="module")
def bundle(group):
    """Two cells whose heads are of one kind, trained side by side, and their states on the way."""
    before = num_compiled()
    trainees = trainees_of(group, LOSSES, compile=True)
    states = train(trainees, range(STEPS))
    assert num_compiled() == before + 1, "one code for both, at all steps"
    return trainees, states


def test_it_trains_as_torch_does_without_it_but_for_rounding(group, bundle):
    for trainee, loss in zip(bundle[0], LOSSES, strict=True):
        (plain,) = trainees_of(group, [loss], compile=False)
        start = weights(plain)
        train([plain], range(STEPS))
        moved = (weights(plain) - start).norm()
        assert 0 < (weights(trainee) - weights(plain)).norm() < 1e-4 * moved


def test_alone_and_resumed_where_nothing_was_kept_a_cell_has_the_same_bits(
    group, bundle, tmp_path, monkeypatch
):
    """Another process on another node: the code is made anew, of the second cell alone."""
    compile_into(monkeypatch, tmp_path)
    (alone,) = trainees_of(group, LOSSES[1:], compile=True)
    states = bundle[1]
    alone.load(copy.deepcopy(states[0][1]))
    train([alone], range(1, STEPS))
    assert list(tmp_path.rglob("*.so")), "compiled anew"
    assert_equal_states(alone.state(), states[-1][1])


def test_pictures_of_any_size_are_evaluated_by_the_plain_network(group, bundle):
    (compiled, _), states = bundle
    (plain,) = trainees_of(group, LOSSES[:1], compile=False)
    plain.load(copy.deepcopy(states[-1][0]))
    before = num_compiled()
    with torch.no_grad():
        for size in ((3, 4), (4, 3), (5, 9)):
            features = torch.randn(1, 960, *size)
            logits = [one.network.eval()(features) for one in (compiled, plain)]
            assert torch.equal(*logits)
    assert num_compiled() == before


def test_inputs_of_another_shape_are_not_taken_for_the_same(monkeypatch):
    """One shape, one code; and beyond torch's limit of codes an error, not the plain network."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    torch._dynamo.reset()
    monkeypatch.setattr(compiled_network, "_compiled", without_inductor)
    form = training_form(torch.nn.ReLU(), Protocol(compile=True))
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
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch._dynamo.reset()
    trained = []
    for compile in (False, True):
        grid = grid_of(
            tmp_path / str(compile), streets.folder, *LOSSES,
            weights="none", train=train_what, epochs=1, compile=compile,
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
    take_compiler_away(monkeypatch, tmp_path / "compiled")
    grid = grid_of(tmp_path, streets.folder, "CE", epochs=1, compile=True)
    with pytest.raises(UserError) as refused:
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
    take_compiler_away(monkeypatch, tmp_path / "compiled")
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
