"python -m tinyclip ..."
import sys
from tinyclip.cli.main import main

sys.exit(main())
