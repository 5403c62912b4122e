"python -m tinyclip ..."
import sys
from tinyclip.cli import main

sys.exit(main())
