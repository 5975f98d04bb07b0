"""`optimum-order env` says what a bug report needs, and nothing about who writes it."""

import getpass
import json
import os
import socket
from importlib.metadata import PackageNotFoundError

import torch

from optimum_order import __version__
from optimum_order.cli import env


def test_it_names_versions_and_hardware(program):
    done = program("env", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["versions"]["optimum_order"] == __version__
    assert result["processor"]["threads"] == torch.get_num_threads()
    assert 0 < result["memory"]["available"] <= result["memory"]["total"]
    assert result["engines"]["transformers"] and set(result["engines"]) >= {"vllm", "llama.cpp"}
    shown = program("env").out
    assert __version__ in shown and "threads" in shown and "GB" in shown


def test_it_names_no_path_and_no_person(program):
    text = program("env", "--json").out
    private = {os.path.expanduser("~"), os.getcwd(), socket.gethostname(), getpass.getuser()}
    assert not [name for name in private if len(name) > 1 and f'"{name}' in text]


def test_extras_are_those_of_the_package(monkeypatch):
    class Facts:
        def get_all(self, key):
            extras = ["gguf", "plots", "dev", "all"]
            requirements = [
                "torch>=2",
                "torch; extra == 'gguf'",
                "no-such-package; extra == 'plots'",
            ]
            return {"Provides-Extra": extras, "Requires-Dist": requirements}[key]

    monkeypatch.setattr(env, "metadata", lambda name: Facts())
    assert env._extras() == {"gguf": True, "plots": False}

    def missing(name):
        raise PackageNotFoundError

    monkeypatch.setattr(env, "metadata", missing)
    assert env._extras() == {}
