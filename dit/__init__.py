"""Networks: what happens inside one forward pass.

Shape letters, used in every comment of this project:

    B batch   N tokens   L text tokens   D model width   K heads   E head width
    C latent channels   H W height and width   T frames (a time step is `t`)   P values in a patch

No component class may live in this file: diffusers' loader would take its module name `dit` for its own DiT pipeline.
"""

__version__ = "0.1.0"
