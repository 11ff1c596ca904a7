"""Ground expressions in images: `python ground.py --help`; the program is hivg/ground.py."""

from hivg.ground import start

if __name__ == "__main__":
    start()
