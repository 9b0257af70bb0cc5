"""Rule `htp-makefile`: the Makefile of a QNN op package, which stands on its own.

Put it beside the package's src/ and run `make htp_v75`: it needs GNU make, the SDKs and no qbuild.
"""

from __future__ import annotations

from buildsys.rules.qualcomm.targets import ARCH_OPTIONS, MAKE_TEXT, TARGETS
from buildsys.rules.spec import Rule, StepContext

RULE = Rule(
    name="htp-makefile",
    doc="The Makefile of a QNN op package: targets htp_v68 to htp_v81, htp_x86, htp_aarch64, "
    "clean.",
    options={
        "package": {
            "type": "string",
            "pattern": "^[A-Za-z_][A-Za-z0-9_]*$",
            "description": "The package's name: libQnnNAME.so comes out.",
        },
        "all": {
            "type": "array",
            "items": {"enum": list(TARGETS)},
            "minItems": 1,
            "uniqueItems": True,
            "default": ["htp_v75", "htp_x86", "htp_aarch64"],
            "description": "What `make` without a target makes.",
        },
        "archs": ARCH_OPTIONS,
        "flags": {
            "type": "array",
            "items": MAKE_TEXT,
            "default": [],
            "description": "Further flags of the compilers of all targets; text of make.",
        },
        "template": {
            "type": "string",
            "default": "htp_makefile.j2",
            "description": "File name of the template, in templates/ of the project or of qbuild.",
        },
    },
    distributions=("jinja2",),
    templates=("template",),
)


def make(step: StepContext) -> None:
    """Write the Makefile. Raises StepError for a template that Jinja refuses."""
    from buildsys.rules.qualcomm.makefile import render_makefile
    from buildsys.rules.script import find_template

    options = step.options
    text = render_makefile(
        find_template(str(options["template"])),
        options["package"],
        options["archs"],
        options["flags"],
        options["all"],
    )
    step.out.write_text(text, encoding="utf-8", newline="")
