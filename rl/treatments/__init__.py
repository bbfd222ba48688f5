"""The treatments by their command-line names: what is done to a network besides training it.

A treatment is a tuple of parts, done in this order; a part is a module with some of these functions:
    prepare(context): change the freshly built network, before its optimiser exists;
    optimizer_options(config): arguments for Adam;
    backward(network, loss, rows, tasks, generator): fill the gradients in place of loss(rows).backward(); tasks are
        those of the rows;
    make_rule(context): an object that is told the time after every fit by step(clock=...) and has state_dict and
        load_state_dict.
The context (context.py) is the network with its settings, seed, optimiser, plasticity buffer and target networks.
"""

from rl.treatments import gmp, layer_norm, lottery, pcgrad, redo, reset, set, weight_decay

TREATMENTS = {
    "dense": (),
    "gmp": (gmp,),
    "set": (set,),
    "redo": (redo,),
    "reset": (reset,),
    "weight-decay": (weight_decay,),
    "layer-norm": (layer_norm,),
    "pcgrad": (pcgrad,),
    "gmp+weight-decay": (gmp, weight_decay),
    "gmp+pcgrad": (gmp, pcgrad),
    "lottery": (lottery,),
}
