"""python -m hivg.weights fetch | convert | show."""

from hivg.weights import main

main()
