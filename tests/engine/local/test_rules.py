"""Rules as steps: what `make` gets, what it tells, and what is shown when it fails."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from buildsys.engine.executor import Progress
from buildsys.engine.local import process_tree
from tests.engine.local.workshop import Workshop, is_alive


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """One executor for most tests here, whose workers import once."""
    made = Workshop(tmp_path_factory.mktemp("rules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET_OF_THE_CALLER", "1")
        made.run(made.rule("first", "nothing"))
        yield made
    made.executor.close()


def test_what_a_rule_tells_arrives(shared: Workshop) -> None:
    (end,) = shared.run(shared.rule("tell", "tell"))
    assert (end.code, end.error, end.traceback) == (0, "", "")
    assert end.notes == {"fallback": {"lm_head": "Q8_0"}, "figures": [1, 2.5]}
    assert end.warnings == ("something is odd",)
    assert sorted(shared.log("tell").read_text().splitlines()) == ["logged", "printed", "written"]
    assert (shared.staging("tell") / "out").read_text() == "made"


def test_progress_is_thinned_and_its_end_is_kept(shared: Workshop) -> None:
    shared.run(shared.rule("progress", "tell"))
    told = [each for each in shared.events if isinstance(each, Progress) and each.id == "progress"]
    assert told[-1] == Progress("progress", 5000, 5000, "tensors")
    assert len(told) < 50


def test_a_rule_gets_its_context_and_a_clean_process(shared: Workshop) -> None:
    model = {
        "name": "model",
        "kind": "model",
        "paths": {"path": "/some/folder"},
        "digest": "d1",
        "options": {"revision": None},
    }
    order = shared.rule("look", "look", inputs={"model": [model]}, environment={"DECLARED": "yes"})
    (end,) = shared.run(order)
    staging = str(shared.staging("look"))
    assert end.error == ""
    assert end.notes["input"] == [
        "model",
        "model",
        {"path": "/some/folder"},
        "d1",
        model["options"],
    ]
    assert end.notes["outputs"] == {"out": f"{staging}/out"}
    assert end.notes["step"] == ["look", 1, "cpu"]
    assert end.notes["place"] == [staging, ""]
    pid, session = end.notes["session"]
    assert pid == session
    environ = end.notes["environ"]
    assert environ["DECLARED"] == "yes"
    assert environ["HF_HUB_OFFLINE"] == environ["TRANSFORMERS_OFFLINE"] == "1"
    assert environ["HOME"].startswith(staging)
    assert not {"SECRET_OF_THE_CALLER", "USER", "PYTEST_CURRENT_TEST"} & set(environ)


def test_the_order_of_sets_is_the_same_in_every_process(shared: Workshop) -> None:
    inputs = {"model": [{"name": "m", "kind": "file", "paths": {"path": "/m"}, "digest": "d"}]}
    orders = [shared.rule(f"hash-{w}", "look", inputs=inputs, worker=w) for w in ("light", "fresh")]
    assert len({end.notes["hash"] for end in shared.run(*orders)}) == 1


def test_a_mistake_of_the_users_has_no_traceback(shared: Workshop) -> None:
    own, other = shared.run(
        shared.rule("person", "person"), shared.rule("other_family", "other_family")
    )
    assert (own.code, own.error, own.traceback) == (
        1,
        "person: 'x' is not a model\ngive a folder",
        "",
    )
    assert (other.code, other.error, other.traceback) == (1, "tensor 'w': truncated", "")


def test_a_bug_shows_where_it_is(shared: Workshop) -> None:
    (end,) = shared.run(shared.rule("bug", "bug"))
    assert end.code == 1
    assert end.error == "KeyError: 'no such option'"
    assert 'print(step.options["no such option"])' in end.traceback
    assert "step_main" not in end.traceback


@pytest.mark.parametrize("do", ["memory", "torch_memory"])
def test_a_lack_of_memory_is_called_so(shared: Workshop, do: str) -> None:
    (end,) = shared.run(shared.rule(do, do, worker="python"))
    assert end.code == 1
    assert end.error.startswith("out of memory: ")


@pytest.mark.parametrize(
    ("do", "words"),
    [
        ("leave", "the rule ended its process with sys.exit(7)"),
        ("vanish", "the step's process ended without a result"),
        ("die", "killed by SIGKILL, not by qbuild"),
        ("unspeakable", "TypeError: Object of type PosixPath is not JSON serializable"),
    ],
)
def test_a_rule_that_ends_oddly_has_failed(shared: Workshop, do: str, words: str) -> None:
    (end,) = shared.run(shared.rule(do, do))
    assert end.code != 0
    assert words in end.error
    assert end.signal == (signal.SIGKILL if do == "die" else 0)


def test_a_rule_that_is_not_there_is_an_error_of_that_step(shared: Workshop) -> None:
    order = shared.order("absent", module="buildsys.rules.no_such_rule")
    (end,) = shared.run(order)
    assert end.error == "ModuleNotFoundError: No module named 'buildsys.rules.no_such_rule'"


def test_long_words_arrive_whole(shared: Workshop) -> None:
    (end,) = shared.run(shared.rule("long", "long_words"))
    assert len(end.notes["long"]) == 3_000_000


def test_torch_is_imported_once_and_threads_are_as_ordered(shared: Workshop) -> None:
    orders = [
        shared.rule(f"threads-{count}", "threads", worker="python", threads=count)
        for count in (1, 2, 3)
    ]
    for count, end in zip((1, 2, 3), shared.run(*orders), strict=True):
        assert end.error == ""
        assert end.notes["had_torch"]
        assert end.notes["deterministic"]
        set_to, seen = end.notes["threads"]
        assert set_to == count
        assert seen >= count
        assert end.cpu < 0.7, "importing torch alone takes longer"
        # It shares the worker's pages, so what it holds is a part of them.
        assert 1 << 20 < end.peak_memory < 150 << 20


def test_a_fresh_process_has_imported_nothing(shared: Workshop) -> None:
    (end,) = shared.run(shared.rule("fresh", "threads", worker="fresh", threads=2))
    assert end.error == ""
    assert not end.notes["had_torch"]
    assert end.notes["threads"][0] == 2


def test_fifty_light_steps_take_little(shared: Workshop) -> None:
    ends = shared.run(*(shared.rule(f"light-{number}", "nothing") for number in range(50)))
    assert all(end.code == 0 for end in ends)
    assert sum(end.cpu for end in ends) < 50 * 0.05
    assert all((shared.staging(f"light-{number}") / "out").exists() for number in range(50))


def test_steps_outlive_their_worker_and_the_next_one_gets_another(workshop: Workshop) -> None:
    workshop.executor.submit(workshop.rule("long", "hang"))
    workshop.wait_for_text("long", "ready")
    supervisor = workshop.executor.supervisor_pid
    assert supervisor is not None
    (worker,) = set(process_tree.children(supervisor)) - {workshop.pid("long")}
    os.kill(worker, signal.SIGKILL)
    workshop.until(lambda: not is_alive(worker))
    (end,) = workshop.run(workshop.rule("next", "tell"))
    assert end.code == 0
    assert is_alive(workshop.pid("long"))
    workshop.executor.cancel("long")
    workshop.until(lambda: workshop.ended("long") is not None)


def fake_torch(folder: Path, text: str, patch: pytest.MonkeyPatch) -> None:
    (folder / "torch.py").write_text(text)
    patch.setattr(sys, "path", [str(folder), *sys.path])


def test_a_worker_that_cannot_import_says_why(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_torch(tmp_path, "raise ImportError('libgomp.so.1: not found')", monkeypatch)
    first, second = workshop.run(
        workshop.rule("a", "nothing", worker="python"),
        workshop.rule("b", "nothing", worker="python"),
    )
    for end in (first, second):
        assert end.code == 1
        assert "the warm worker ended unexpectedly" in end.error
        assert "ImportError: libgomp.so.1: not found" in end.error
    (light,) = workshop.run(workshop.rule("c", "nothing"))
    assert light.code == 0


def test_a_worker_with_threads_is_not_forked(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "import threading, os\n"
        "if os.getenv('HOME') is None: threading.Thread(target=threading.Event().wait).start()\n"
        "def set_num_threads(n): pass\n"
        "def set_deterministic_debug_mode(mode): pass\n"
    )
    fake_torch(tmp_path, text, monkeypatch)
    (end,) = workshop.run(workshop.rule("a", "nothing", worker="python"))
    assert end.code == 0, end.error
    (warning,) = end.warnings
    assert "the warm worker has 2 threads" in warning


def test_an_order_that_waits_for_its_worker_can_be_cancelled(workshop: Workshop) -> None:
    workshop.executor.submit(workshop.rule("a", "nothing", worker="python"))
    workshop.executor.cancel("a")
    workshop.until(lambda: workshop.ended("a") is not None)
    end = workshop.ended("a")
    assert end is not None
    assert end.error == "cancelled"


def test_peak_memory_of_a_forked_step_leaves_out_what_it_only_shares(shared: Workshop) -> None:
    (end,) = shared.run(shared.rule("share", "wait_a_little", worker="python"))
    assert end.error == ""
    resident = end.notes["anonymous"]
    assert resident > 100 << 20, "all of torch counts as the child's own by the simple figure"
    assert 60 << 20 < end.peak_memory < resident
