"""Ground expressions in images: `python ground.py --help`; the program is hivg/__main__.py."""

from hivg.__main__ import start

if __name__ == "__main__":
    start()
