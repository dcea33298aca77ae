from visar.cli.main import COMMANDS, main, parse

__all__ = ["COMMANDS", "main", "parse"]
