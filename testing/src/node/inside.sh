#!/bin/sh
# First process of a node's namespaces: hides the machine's own folders that a kubelet writes to,
# then waits for the end of its input and collects what has ended.
#
# Usage: inside.sh FOLDER NAME. Writes its process id, as seen from outside, to FOLDER/pid.
set -eu
folder=$1
name=$2

# Still the outer /proc, which knows this process by its outer id. `read` is no process of its own.
read -r pid _ </proc/self/stat

# Nothing of what is mounted here is seen outside; below, pods may share mounts.
mount --make-rprivate /
mount --make-rshared /
mount -t proc proc /proc
mount -t tmpfs -o mode=755 "$name" /run
mkdir "$folder/lib" "$folder/log"
mount --bind "$folder/lib" /var/lib
mount --bind "$folder/log" /var/log

hostname "$name"
ip link set lo up
echo 1 >/proc/sys/net/ipv4/ip_forward

echo "$pid" >"$folder/pid.new"
mv "$folder/pid.new" "$folder/pid"

# A job in the background has no standard input unless it is told to.
exec 3<&0
cat <&3 >/dev/null &
wait $!
