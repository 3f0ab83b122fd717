#!/bin/sh
# Runs a node inside namespaces of its own, and removes what they leave once they have ended.
#
# Usage: guard.sh FOLDER NAME. The standard input is a pipe that the test holds open: however the
# test ends, the node ends with it. Then the kernel has killed every process in the PID namespace,
# and taken the mounts and links of the others; cgroups, the folder and the link's outer end are
# left for here.
set -u
folder=$1
name=$2

# Ctrl-C ends the test, and that is what ends this.
trap '' HUP INT TERM

# If this is killed, unshare is killed, and then the first process in the namespaces.
setpriv --pdeathsig KILL \
    unshare --pid --mount --net --ipc --uts --fork --kill-child=KILL \
    sh "$folder/inside.sh" "$folder" "$name"

cgroups() {
    while read -r _ path type _; do
        case $type in cgroup | cgroup2) ;; *) continue ;; esac
        if [ -d "$path/$name" ]; then
            find "$path/$name" -depth -type d -exec rmdir {} \;
        fi
    done </proc/mounts
}

clean() {
    ip link delete "$name" 2>/dev/null
    cgroups 2>/dev/null
    rm -rf --one-file-system "$folder" 2>/dev/null
    [ ! -e "$folder" ] && [ -z "$(cgroups 2>&1)" ]
}

# What has just been killed can hold a cgroup for a moment longer.
for _ in $(seq 300); do
    clean && exit 0
    sleep 0.1
done
echo "$folder, or cgroups named $name, cannot be removed" >&2
exit 1
