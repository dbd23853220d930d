from twotower_sim.cli import main

main()
