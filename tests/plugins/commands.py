"""Run commands in one process, and load what each has written with stock transformers.

python commands.py MODULE COMMANDS

MODULE is imported before anything is loaded. COMMANDS is a JSON list of lists of words; the third
word of each is the folder that is written.
"""

import importlib
import json
import sys

from transformers import AutoModelForCausalLM

from optimum_order.cli import main

module, commands = sys.argv[1:]
importlib.import_module(module)
for command in json.loads(commands):
    try:
        main(command)
    except SystemExit as ended:
        assert ended.code == 0, command
    _, loading = AutoModelForCausalLM.from_pretrained(command[2], output_loading_info=True)
    assert not any(loading.values()), loading
