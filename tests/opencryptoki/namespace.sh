#!/bin/sh
# Run a command beside an opencryptoki of its own: no file, semaphore or process of the
# machine's own is touched, and all ends with the command. As root, in new mount, IPC
# and PID namespaces:
#
#     unshare --mount --ipc --pid --fork --kill-child --mount-proc \
#         sh namespace.sh COMMAND [ARGUMENT ...]
set -eu

mount --make-rprivate /
for folder in /run /dev/shm; do
    mount -t tmpfs tmpfs "$folder"
done
store=/var/lib/opencryptoki
mount -t tmpfs tmpfs "$store"
# What the package's own installation makes; /var/lock is a link to /run/lock.
mkdir -p "$store/swtok/TOK_OBJ" /run/lock/opencryptoki /run/opencryptoki \
    /var/log/opencryptoki
chgrp -R pkcs11 "$store" /run/lock/opencryptoki
chmod -R 770 "$store" /run/lock/opencryptoki

# It goes to the background when its socket and its shared memory are there.
pkcsslotd
exec "$@"
