"""Training loops of others over an offloaded model: Hugging Face's Trainer and TRL, accelerate, Lightning.

Each module needs the framework that it is named after; nothing else of the package imports them.
"""

from funicular.install import install

install()
