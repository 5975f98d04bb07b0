"""Makes `optimum-cli order` exist. Optimum imports every module of this namespace: import nothing heavy here."""

from optimum_order.cli import OrderCommand

REGISTER_COMMANDS = [OrderCommand]
