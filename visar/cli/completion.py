"""`visar completion`: a script that completes commands and their flags in a shell."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

# Flags that commands take out of a line before their options are read (visar.cli.main).
_EARLY = {"train": ("--recipe",)}
_BASH = """# Completion of visar: eval "$(visar completion bash)", or the output in a file of bash_completion.d.
_visar() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" first="${{COMP_WORDS[1]}}" words=""
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{firsts} help --help --version"
    else
        case "$first ${{COMP_WORDS[*]:2:COMP_CWORD-2}} " in
{cases}
        esac
        case "$current$words" in
            -*) ;;
            *--*) words="" ;;
        esac
    fi
    if [ -n "$words" ]; then
        COMPREPLY=($(compgen -W "$words" -- "$current"))
    else
        COMPREPLY=($(compgen -f -- "$current"))
    fi
}}
complete -o filenames -F _visar visar
"""


@dataclass(frozen=True)
class Completion:
    """Prints a script that completes commands and flags: put eval "$(visar completion bash)" into ~/.bashrc."""

    shell: Annotated[tyro.conf.Positional[Literal["bash", "zsh"]], tyro.conf.arg(metavar="{bash,zsh}")] = "bash"
    """Shell: bash, or zsh through its bashcompinit."""


def flags_of(options: type) -> list[str]:
    """All flags of a command."""
    parser: Any = tyro.extras.get_parser(options)
    return sorted({flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")})


def completion(shell: str, commands: Mapping[str, tuple[str, Callable[[], tuple[type, Any]]]]) -> str:
    """The script.

    Args:
        shell: bash or zsh.
        commands: those of the command line, by name.
    """
    groups: dict[str, list[str]] = {}
    cases = []
    # Names of two words before those of one, so that the longer one is found first.
    for name in sorted(commands, key=lambda name: -len(name.split())):
        first, _, second = name.partition(" ")
        flags = [*flags_of(commands[name][1]()[0]), *_EARLY.get(first, ())]
        pattern = f'"{first} "*"{second} "*' if second else f'"{first} "*'
        cases.append(f'            {pattern}) words="{" ".join(flags)}" ;;')
        if second and not second.startswith("-"):
            groups.setdefault(first, []).append(second)
    cases += [f'            "{first} "*) words="{" ".join(seconds)}" ;;' for first, seconds in groups.items()]
    firsts = " ".join(dict.fromkeys(name.split()[0] for name in commands))
    script = _BASH.format(firsts=firsts, cases="\n".join(cases))
    return script if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{script}"
