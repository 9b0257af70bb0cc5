"""`qbuild deploy`: build what is stale, put it on devices, and run it there."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from buildsys.cli.build_words import add_folder_words, project_of, say
from buildsys.cli.recipe_words import SUFFIX
from buildsys.errors import UsageError

if TYPE_CHECKING:
    import threading
    from collections.abc import Sequence

    from buildsys.devices.definitions import Device
    from buildsys.devices.deploying import Task
    from buildsys.devices.payload import PushFile
    from buildsys.devices.progress import Report
    from buildsys.engine.project import Project
    from buildsys.recipe.nodes import Table

RESULTS = "devices"
NONE_GIVEN = ""


def configure(parser: argparse.ArgumentParser) -> None:
    add_folder_words(parser, targets=False)
    parser.add_argument(
        "--device",
        dest="devices",
        action="append",
        nargs="?",
        const=NONE_GIVEN,
        metavar="NAME",
        help="a device, or all; several in parallel; without a name the only one",
    )
    parser.add_argument("--run", action="store_true", help="run what the device's `run` says")
    parser.add_argument("-n", "--dry-run", action="store_true", help="check all, write nothing")
    parser.add_argument("--verify", action="store_true", help="compare every digest on the device")
    parser.add_argument("--no-build", action="store_true", help="deploy what is built")
    parser.add_argument("--prune", action="store_true", help="remove what is no longer deployed")
    parser.add_argument(
        "--replace-in-place",
        action="store_true",
        help="remove old files first: for a device where old and new do not fit together",
    )
    parser.add_argument("--adb", metavar="PROGRAM", help="the adb to use")
    parser.add_argument("--json", action="store_true", help="events as lines of JSON")
    parser.epilog = "With --run, what stands after -- is given to the program."


def run(args: argparse.Namespace) -> int:
    """The worst exit code of all devices; of a run, the program's own."""
    from buildsys.devices import definitions
    from buildsys.devices.several import on_each

    sort_words(args)
    project, _ = project_of(args)
    mine = definitions.read_user_file(definitions.user_file())
    known = definitions.devices_of(project.plan, mine)
    devices = definitions.choose(known, [word for word in args.devices or () if word])
    code = build_what_is_pushed(args, project, devices)
    if code:
        say("nothing was sent")
        return code
    files = payloads(args, project, devices, mine)

    def work(device: Device, report: Report, stop: threading.Event) -> int:
        from buildsys.devices.deploying import deploy

        return deploy(device, files[device.name], task_of(args, project), report, stop)

    return on_each(devices, work, as_json=args.json)


def sort_words(args: argparse.Namespace) -> None:
    """`--device recipe.yaml` names the recipe and no device; ARGS need something that runs."""
    for at, word in enumerate(args.devices or ()):
        if word.endswith(SUFFIX) and args.words is None:
            args.words, args.devices[at] = word, NONE_GIVEN
    if args.words is not None and not args.words.endswith(SUFFIX):
        raise UsageError(f"'{args.words}' is no recipe: its name would end in {SUFFIX}")
    if args.rest and not args.run:
        raise UsageError("arguments after -- are for the program", remedy="add --run")


def build_what_is_pushed(
    args: argparse.Namespace, project: Project, devices: Sequence[Device]
) -> int:
    """Build what the devices take and what the gates read; 0 where all of it is fresh.

    An optional artifact that nothing takes may be skipped here, and its gates with it."""
    from buildsys.devices.payload import wanted_artifacts

    wanted = [name for device in devices for name in wanted_artifacts(device, project.plan)]
    plan = project.plan
    read = [gate.artifact for gate in plan.gates]
    wanted += [name for name in read if not plan.steps[plan.producer[name]].optional]
    targets = list(dict.fromkeys(wanted))
    if args.no_build or args.dry_run or not targets:
        return 0
    from buildsys.cli import up_to_date

    parser = argparse.ArgumentParser()
    up_to_date.configure(parser, targets=True)
    # stdout is for events then; what fails is told on stderr in any case.
    words = [os.path.abspath(project.recipe), *targets, *(["--quiet"] if args.json else [])]
    # A new build folder has no record of them yet.
    words += [f"-D{name}={value}" for name, value in project.defines.items()]
    return up_to_date.run(parser.parse_args([*words, "--build-dir", project.folder.root]))


def payloads(
    args: argparse.Namespace, project: Project, devices: Sequence[Device], mine: Table | None
) -> dict[str, list[PushFile]]:
    """The files for each device, after everything that can be checked without it."""
    from buildsys.devices import lineage
    from buildsys.devices.built import check_built, check_gates
    from buildsys.devices.host_files import HostFiles
    from buildsys.devices.npu import with_npus
    from buildsys.devices.payload import files_of, items, toolchain_roots, wanted_artifacts
    from buildsys.recipe.nodes import plain

    own = plain(mine.entries["toolchains"]) if mine and "toolchains" in mine.entries else {}
    roots = toolchain_roots(devices, project.plan.recipe, own)
    known = HostFiles(project.folder.own("sha256"))
    files = {}
    wanted = {device.name: wanted_artifacts(device, project.plan) for device in devices}
    done = check_built(project, [name for names in wanted.values() for name in names], say)
    check_gates(project)
    for device in devices:
        things = items(device, project.plan, project.folder.root, roots)
        files[device.name] = with_npus(project.plan, done, files_of(things, known))
        lineage.check_rotations(project.plan, done, wanted[device.name], files[device.name])
    known.save()
    return files


def task_of(args: argparse.Namespace, project: Project) -> Task:
    from buildsys.devices.deploying import Task
    from buildsys.devices.protocol import Options

    return Task(
        options=Options(args.verify, args.prune, args.replace_in_place),
        dry_run=args.dry_run,
        run=args.run,
        arguments=tuple(args.rest),
        adb=args.adb,
        results=os.path.join(project.folder.root, RESULTS),
    )
