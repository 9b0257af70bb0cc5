"""How toolchains are installed: one module each, with `install(destination, job)`.

The destination may not exist, or hold what an installation that was killed has left; what of
that can be trusted is for the installer to know. It returns when all is there.
"""
