"""Parameters and FLOPs of the model families, from their configs and the shapes of their parameters.

FLOPs are of the forward pass, two per multiply-add, and of two kinds:
  algorithmic  what the papers count: matrix products and attention scores of the experts a token
               chose; router, norms and activations are left out (Switch, section 2.1 and Table 1)
  executed     what the machine does: every slot of every expert whether filled or not, every
               attention score whether masked or not, the router, and the products that mix tokens in
               Soft MoE (without those of einsum dispatch, and without padding of dropless rows)
A training step costs about three forward passes; rematerialization adds up to one. `training` counts
it exactly, for the kernels of a platform.
"""
