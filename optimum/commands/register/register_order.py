"""Makes `optimum-cli order` exist. Optimum imports every module of this namespace, so nothing heavy is imported here."""

from optimum_order.cli import OrderCommand

REGISTER_COMMANDS = [OrderCommand]
