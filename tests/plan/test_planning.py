"""A recipe becomes the graph that it describes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from buildsys.plan.graph import Plan, Ref
from buildsys.plan.planning import make_plan
from buildsys.recipe.loading import read_recipe
from buildsys.rules.spec import Rule

Load = Callable[..., Plan]
Rules = Mapping[str, Rule]


def test_a_step_has_everything_resolved(artifacts: Load) -> None:
    plan = artifacts(
        """\
        r.bin: {rule: rotation, inputs: {model: model}, options: {seed: 4}}
        s/a.json:
          rule: scales
          inputs: {model: model, rotation: r.bin, samples: [text]}
          options: {level: 0.5}
          outputs: {dump: d.npz}
          optional: true
          temporary: true
          tags: [qnn, x]
          resources: {memory: 4GiB, gpu: 1, licence: qubee, threads: 3, jobs: 2}
          timeout: 10m
          toolchain: special
          environment: {LANG: C}
        """
    )
    assert list(plan.steps) == ["r.bin", "s/a.json"]
    rotation, scales = plan.steps.values()
    assert rotation.options == {"method": "hadamard", "seed": 4, "vision": True}
    assert (rotation.threads, rotation.toolchain, rotation.timeout) == (2, None, None)
    assert scales.inputs == {
        "model": (Ref("source", "model"),),
        "rotation": (Ref("artifact", "r.bin"),),
        "samples": (Ref("source", "text"),),
    }
    assert scales.outputs == {"out": "s/a.json", "histogram": "s/histogram.json", "dump": "d.npz"}
    assert scales.resources == {"memory": 2**32, "gpu": 1, "licence": ["qubee"], "jobs": 2}
    assert (scales.threads, scales.timeout, scales.toolchain) == (3, 600.0, "special")
    assert (scales.optional, scales.temporary, scales.tags) == (True, True, ("qnn", "x"))
    assert scales.environment == {"LANG": "C"}
    assert scales.where[:3] == ("r.yaml", 8 + 1, 3)
    assert plan.producer == {
        "r.bin": "r.bin",
        "s/a.json": "s/a.json",
        "s/histogram.json": "s/a.json",
        "d.npz": "s/a.json",
    }


def test_a_rules_toolchain_is_the_default(artifacts: Load) -> None:
    plan = artifacts("b/: {rule: bundle, inputs: {parts: own}}\n")
    assert plan.steps["b/"].toolchain == "packer"


def test_sources_have_absolute_paths_and_their_options(load: Load, project: Path) -> None:
    (project / "m").mkdir()
    plan = load(
        """\
        qbuild: 1
        vars: {data: {type: path, default: d}}
        sources:
          model: {model: m, revision: main}
          hub: {model: Qwen/Qwen2-VL-2B-Instruct, revision: abc}
          text: {text: "${data}/t.txt", samples: 3, tokens: 9, doc: words}
          images: {images: i, size: [224, 112], prompts: p.yaml, answers: null, samples: 2}
          none: {folder: "${data}", when: "${equals(data, 'x')}"}
        """
    )
    sources = plan.sources
    assert list(sources) == ["model", "hub", "text", "images"]
    assert sources["model"].paths == {"path": str(project / "m")}
    assert sources["model"].options == {}
    assert sources["hub"].paths == {"path": ""}
    assert sources["hub"].options == {"hub": "Qwen/Qwen2-VL-2B-Instruct", "revision": "abc"}
    assert sources["text"].paths == {"path": str(project / "d/t.txt")}
    assert sources["text"].options == {"samples": 3, "tokens": 9}
    assert sources["images"].paths == {"path": f"{project}/i", "prompts": f"{project}/p.yaml"}
    assert sources["images"].options == {"size": [224, 112], "samples": 2}


def test_any_output_may_be_an_input_elsewhere(artifacts: Load) -> None:
    plan = artifacts(
        """\
        last: {rule: run, inputs: {x: h.json, y: b/}, options: {argv: [a]}}
        b/: {rule: bundle, inputs: {parts: [own, s]}}
        s:
          rule: scales
          inputs: {model: model, samples: text}
          options: {level: 1}
          outputs: {histogram: h.json}
        """
    )
    assert plan.steps["last"].inputs["x"] == (Ref("artifact", "h.json"),)
    assert list(plan.steps) == ["s", "b/", "last"]


def test_order_is_the_recipes_where_nothing_forbids_it(artifacts: Load) -> None:
    names = [f"n{n}" for n in (5, 3, 9, 1, 7)]
    text = "".join(f"{name}: {{rule: run, options: {{argv: [a]}}}}\n" for name in names)
    text = "all: {rule: run, inputs: {x: 'n*'}, options: {argv: [a]}}\n" + text
    assert list(artifacts(text).steps) == [*names, "all"]


def test_a_matrix_makes_one_artifact_for_each_combination(artifacts: Load) -> None:
    plan = artifacts(
        """\
        "k/${arch}/${soc.name}.so":
          matrix: {arch: [v73, v75], soc: [{name: A, n: 1}, {name: B, n: 2}]}
          rule: run
          options: {argv: ["${arch}", "${soc.name}", "${out}"], note: "${soc.n} of ${arch}"}
        all: {rule: run, inputs: {x: "k/v75/*"}, options: {argv: [a]}}
        """
    )
    assert list(plan.steps) == ["k/v73/A.so", "k/v73/B.so", "k/v75/A.so", "k/v75/B.so", "all"]
    assert plan.steps["k/v75/B.so"].options == {"argv": ["v75", "B", "${out}"], "note": "2 of v75"}
    assert [ref.name for ref in plan.steps["all"].inputs["x"]] == ["k/v75/A.so", "k/v75/B.so"]


def test_when_leaves_out_and_optional_follows(load: Load) -> None:
    text = """\
        qbuild: 1
        vars: {mllm: {type: path, default: null}, n: 3}
        sources: {src: {folder: "${mllm}", when: "${mllm}"}}
        artifacts:
          lib.so: {rule: run, inputs: {s: src}, options: {argv: [a]}, optional: true}
          "${i}.txt":
            matrix: {i: [1, 2, 3]}
            when: "${equals(i, n)}"
            rule: run
            options: {argv: [a]}
          kit/:
            rule: bundle
            inputs: {parts: ["3.txt", {from: [lib.so, "*.so"], optional: true}]}
            optional: true
          more: {rule: run, inputs: {x: lib.so}, options: {argv: [a]}, optional: true}
        gates: {lib.so: {size: 3}, 3.txt: {size: 4}}
        """
    plan = load(text)
    assert list(plan.steps) == ["3.txt", "kit/"]
    assert plan.steps["kit/"].inputs["parts"] == (Ref("artifact", "3.txt"),)
    assert [gate[:3] for gate in plan.gates] == [("3.txt", "size", 4.0)]
    on = load(text, mllm="src", n="1")
    assert list(on.steps) == ["lib.so", "1.txt", "more"]


def test_an_input_that_may_be_missing_is_marked(artifacts: Load) -> None:
    plan = artifacts(
        """\
        a: {rule: run, options: {argv: [a]}, optional: true}
        b: {rule: run, inputs: {x: {from: a, optional: true}, y: [a, own]}, options: {argv: [a]}}
        """
    )
    assert plan.steps["b"].inputs["x"] == (Ref("artifact", "a", True),)
    assert plan.steps["b"].inputs["y"] == (Ref("artifact", "a"), Ref("source", "own"))


def test_a_file_of_the_users_stands_in_for_an_artifact(artifacts: Load) -> None:
    plan = artifacts(
        """\
        s:
          rule: scales
          inputs: {model: model, rotation: own, samples: text}
          options: {level: 1}
        """
    )
    assert plan.steps["s"].inputs["rotation"] == (Ref("source", "own"),)


def test_an_artifact_folder_stands_in_for_a_model(artifacts: Load) -> None:
    plan = artifacts(
        """\
        m/: {rule: bundle, inputs: {parts: own}}
        r: {rule: rotation, inputs: {model: m/}}
        """
    )
    assert plan.steps["r"].inputs["model"] == (Ref("artifact", "m/"),)


def test_gates_and_devices_are_kept(load: Load) -> None:
    plan = load(
        """\
        qbuild: 1
        vars: {limit: 0.25, root: /data/q}
        artifacts: {"${stem('x.json')}.json": {rule: run, options: {argv: [a]}}}
        gates: {x.json: {"int8 ppl": "${limit}"}}
        devices:
          phone:
            transport: adb
            root: "${root}"
            push: {x.json: "lib/${device.arch}/"}
            run: {argv: [./run.sh], timeout: 600s}
        """,
        limit="0.5",
    )
    assert [gate[:3] for gate in plan.gates] == [("x.json", "int8 ppl", 0.5)]
    phone = plan.devices["phone"]
    assert phone["root"] == "/data/q"
    assert phone["push"] == {"x.json": "lib/${device.arch}/"}
    assert plan.defines == {"limit": "0.5"}


def test_defaults_of_options_are_never_shared(artifacts: Load) -> None:
    plan = artifacts("a: {rule: run, options: {argv: [a]}}\nb: {rule: run, options: {argv: [a]}}\n")
    one: dict[str, Any] = dict(plan.steps["a"].options)
    assert one == plan.steps["b"].options
    assert plan.steps["a"].options["argv"] is not plan.steps["b"].options["argv"]


# Audit hooks cannot be taken off again: one is put on, and listens when it is told to.
events: list[str] = []
listening = False


def listener(event: str, args: tuple[Any, ...]) -> None:
    if listening:
        events.append(event)


def while_listening(work: Callable[[], object]) -> list[str]:
    global listening
    if listener not in vars(sys).setdefault("_qbuild_listeners", []):
        sys.addaudithook(listener)
        vars(sys)["_qbuild_listeners"].append(listener)
    events.clear()
    listening = True
    try:
        work()
    finally:
        listening = False
    return list(events)


TOUCHES_DISK = ("open", "os.", "shutil.", "subprocess.", "socket.", "glob.", "tempfile.")


def test_planning_touches_no_file(project: Path, rules: Rules) -> None:
    text = """\
        qbuild: 1
        sources: {model: {model: org/name}, own: {file: own.bin}}
        artifacts:
          r: {rule: rotation, inputs: {model: model}}
          "x/${i}": {matrix: {i: [1, 2]}, rule: run, inputs: {r: r, o: own}, options: {argv: [a]}}
          b/: {rule: bundle, inputs: {parts: "x/*"}}
        """
    (project / "r.yaml").write_text(text)
    recipe = read_recipe("r.yaml", {}, rules)
    make_plan(recipe, rules)
    found = while_listening(lambda: make_plan(recipe, rules))
    assert [event for event in found if event.startswith(TOUCHES_DISK)] == []


def test_reading_a_recipe_writes_nothing_and_runs_nothing(project: Path, rules: Rules) -> None:
    (project / "r.yaml").write_text("qbuild: 1\nsources: {model: {model: org/name}}\n")
    before = sorted(project.rglob("*"))
    found = while_listening(lambda: make_plan(read_recipe("r.yaml", {}, rules), rules))
    assert "open" in found
    assert not [
        e for e in found if e.startswith(("subprocess.", "os.exec", "os.fork", "os.system"))
    ]
    assert not [e for e in found if e.startswith(("os.mkdir", "os.rename", "os.remove", "socket."))]
    assert sorted(project.rglob("*")) == before
