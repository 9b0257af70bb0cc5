"""The environment in which a step runs that uses a toolchain.

    enter:
      environment: {SDK_ROOT: "${root}"}    set as it stands; ${root} is the toolchain's folder
      source: bin/envsetup.sh               a script below that folder, for bash ...
      pass: [PATH, LD_LIBRARY_PATH]         ... and which of the variables that it sets count

The script is read where the step runs, confined as it is, just before its program: looking for a
toolchain executes nothing. That a file of a user's project names a script to run is for a person
to agree to, once for each version of that file: `qbuild toolchain trust NAME`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from buildsys.identity import hash_file
from buildsys.share import shared_folder
from buildsys.toolchains.places import Found

if TYPE_CHECKING:
    from buildsys.plan.graph import Json

VARIABLE = "env."
SCRIPTS = "enter"
# For each script and the names that it may set: what it sets them to, into this environment. The
# script itself runs in a child, so that nothing else of it (functions, options, folder) stays. Its
# status says nothing: vendors' scripts end with whatever their last test was.
READ = """
while [ "$1" != -- ]; do
    script=$1 names=$2; shift 2
    mapfile -d '' -t pairs < <(
        set --
        . "$script" >&2
        for name in $names; do [ -z "${!name+x}" ] || printf '%s=%s\\0' "$name" "${!name}"; done
        printf 'done\\0')
    if [ "${pairs[-1]}" != done ] || [ ! -f "$script" ]; then
        echo "the environment script $script is not there, or ended the shell" >&2; exit 1
    fi
    unset "pairs[-1]"
    for pair in "${pairs[@]}"; do export "$pair"; done
done
shift
exec "$@"
"""


def entered(found: Found, enter: Json) -> Found:
    """The toolchain with what its `enter` says as fields: "env.NAME" for each variable, and
    "enter" for the scripts."""
    root = found.fields["root"]
    fields = dict(found.fields)
    for name, value in (enter.get("environment") or {}).items():
        fields[VARIABLE + name] = str(value).replace("${root}", root)
    fingerprint = {**found.fingerprint, "enter": enter}
    if "source" in enter:
        script = os.path.join(root, enter["source"])
        fields[SCRIPTS] = "\n".join([script, " ".join(enter["pass"])])
        # What is not there is said by the step.
        fingerprint["script"] = hash_file(script) if os.path.isfile(script) else None
    return Found(fields, fingerprint)


def joined(fields: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    """The fields of several toolchains that a step enters one after the other."""
    both = {**fields, **{name: value for name, value in more.items() if name.startswith(VARIABLE)}}
    scripts = [each[SCRIPTS] for each in (fields, more) if SCRIPTS in each]
    return {**both, SCRIPTS: "\n".join(dict.fromkeys(scripts))} if scripts else both


def variables(fields: Mapping[str, str]) -> dict[str, str]:
    """The variables that a toolchain sets without a script."""
    given = fields.items()
    return {name[len(VARIABLE) :]: value for name, value in given if name.startswith(VARIABLE)}


def inside(fields: Mapping[str, str], argv: Sequence[str]) -> tuple[str, ...]:
    """The program, started in the environment that the toolchain's scripts make."""
    if SCRIPTS not in fields:
        return tuple(argv)
    return ("bash", "-c", READ, "bash", *fields[SCRIPTS].split("\n"), "--", *argv)


def trust_file(environment: Mapping[str, str]) -> str:
    """The list of digests that this user trusts."""
    base = environment.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return f"{base}/qbuild/trusted-toolchains"


def definition_file(name: str, folders: Sequence[str]) -> str | None:
    """The file that says what a toolchain is."""
    paths = (f"{folder}/{name}.yaml" for folder in folders)
    return next((path for path in paths if os.path.isfile(path)), None)


def why_untrusted(
    name: str, described: Json, folders: Sequence[str], environment: Mapping[str, str]
) -> str | None:
    """Why nothing of this toolchain is executed; None where it may be. qbuild's own files are
    trusted, and a file that names no script."""
    path = definition_file(name, folders)
    if "source" not in described["enter"] or path is None:
        return None
    if os.path.dirname(path) == shared_folder("toolchains"):
        return None
    try:
        with open(trust_file(environment), encoding="ascii") as file:
            known = file.read().split()
    except OSError:
        known = []
    if hash_file(path) in known:
        return None
    script = described["enter"]["source"]
    return f"{path} runs {script} of it, and is not trusted"


def how_to_trust(name: str) -> str:
    """The command for a person who agrees."""
    return f"qbuild toolchain trust {name}"


def trust(path: str, environment: Mapping[str, str]) -> str:
    """Agree to what a definition file runs; returns the list that says so."""
    place = trust_file(environment)
    os.makedirs(os.path.dirname(place), exist_ok=True)
    with open(place, "a", encoding="ascii") as file:
        file.write(f"{hash_file(path)}\n")
    return place
