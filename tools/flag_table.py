"""Prints docs/flags.md, the reference of every flag, from the fields that define them.

python tools/flag_table.py > docs/flags.md
"""

from __future__ import annotations

from octavo.config.args import Args, EngineArgs, ServerArgs, Setting, flag_of, settings_of
from octavo.config.compat import HARMLESS, REFUSED

HEAD = """# Flags

Written by `tools/flag_table.py` from `octavo/config`. `octavo serve` takes all of them; `chat`, `complete`, `doctor`
and the offline benchmarks take the engine's, and `LLM(...)` takes those as keyword arguments with underscores.
Whole numbers may end in k, m, g (powers of 1000) or K, M, G (powers of 1024).
"""


def table(title: str, struct: type[Args]) -> str:
    rows = [f"| `{shown(setting)}` | {default(setting)} | {setting.help} |" for setting in settings_of(struct)]
    return "\n".join([f"\n## {title}\n", "| flag | default | meaning |", "|---|---|---|", *rows, ""])


def shown(setting: Setting) -> str:
    if setting.kind is bool:
        return f"{setting.flag}, --no-{setting.flag[2:]}"
    if setting.choices is not None:
        choices = " \\| ".join(map(str, setting.choices))
        return f"{setting.flag} {choices}"
    return f"{setting.flag} {'N' if setting.kind is int else 'X' if setting.kind is float else 'TEXT'}"


def default(setting: Setting) -> str:
    return "" if setting.default in (None, ()) else f"`{setting.default}`"


def names(title: str, text: str, flags: list[str]) -> str:
    return f"\n## {title}\n\n{text}\n\n{', '.join(f'`{flag_of(name)}`' for name in sorted(flags))}\n"


def document() -> str:
    return "".join(
        [
            HEAD,
            table("Engine", EngineArgs),
            table("Server", ServerArgs),
            names(
                "Accepted and dropped",
                "vLLM's flags about speed, logs and inner workings; no result depends on them.",
                list(HARMLESS),
            ),
            names(
                "Refused",
                "vLLM's flags for what is not built yet. A value that asks for nothing, such as None in "
                "`LLM(quantization=None)`, is accepted.",
                list(REFUSED),
            ),
        ]
    )


if __name__ == "__main__":
    print(document(), end="")
