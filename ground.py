"""Ground expressions in images, see `python ground.py --help`; the code is in hivg/__main__.py."""

from hivg.__main__ import start

if __name__ == "__main__":
    start()
