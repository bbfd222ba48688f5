"""The treatments by their command-line names: what is done to a network besides training it.

A treatment is a tuple of parts, done in this order; a part is a module with two functions:
    prepare(network, config): change the freshly built network, before its optimiser exists;
    make_rule(network, optimizer, config, seed): an object that is told the time after every fit by step(clock=...) and
        has state_dict and load_state_dict.
"""

from rl.treatments import gmp, set

TREATMENTS = {"dense": (), "gmp": (gmp,), "set": (set,)}
