"""``python -m fluffle``: the command ``fluffle``, for example with a Python that is not on PATH."""

from fluffle_common.cli.app import main

if __name__ == "__main__":
    main()
