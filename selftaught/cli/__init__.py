"""The command line: one subcommand for every method, stage and tool."""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: the arguments after the program's name; default: those of the process.
    """
    from selftaught.cli.command import main as run  # so that importing the package stays cheap

    return run(arguments)
