"""doit without its command line: the walk is its own, and who wants all of doit still gets it."""

from __future__ import annotations

import subprocess
import sys

ALONE = """
import sys
from buildsys.engine.walking import UNUSED, load
before = set(sys.modules)
Task, TaskControl = load()
new = set(sys.modules) - before
assert not new & {*UNUSED, "cloudpickle", "multiprocessing", "sqlite3"}, new
tasks = [Task("b", None, task_dep=["a"]), Task("a", None), Task("c", None, setup=["a"])]
control = TaskControl(tasks)
control.process(["b", "c"])
walk = control.task_dispatcher().generator
order, node = [], next(walk)
for _ in range(3):
    order.append(node.task.name)
    node.run_status = "up-to-date"
    node = walk.send(node) if len(order) < 3 else None
print(*order)
import doit.task, inspect
assert doit.task.Task is not Task and doit.__version__ and inspect.signature(load)
"""


def test_walk_loads_two_modules_of_doit_and_leaves_doit_to_others() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "a b c\n"


def test_loaded_again_where_all_of_doit_is_there() -> None:
    code = "import doit.task\nfrom buildsys.engine.walking import load\nTask, _ = load()\n"
    code += "assert Task is doit.task.Task"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
