"""python -m launch.preflight"""

from launch.preflight import main

if __name__ == "__main__":
    main()
