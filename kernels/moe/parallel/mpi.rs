//! Ranks that are processes which `mpirun` started.
//!
//! One thread of a process talks to MPI, and does what it is asked in the order in which it is asked: what was begun goes on
//! while the others compute.

use std::io::Write;
use std::panic::{PanicHookInfo, set_hook, take_hook};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::datatype::{Partition, PartitionMut};
use mpi::topology::{Color, SimpleCommunicator};
use mpi::traits::{Communicator, CommunicatorCollectives, Root};

use super::{Collectives, Pending, Ranks};

/// Joins the processes that were started together, and leaves them after `f`. A process that no one started together with
/// others is the only rank.
///
/// Until then a panic on any thread of a rank ends all ranks, after saying which one it was. A rank that is killed is missed
/// by `mpirun`, which says so and ends the others.
///
/// # Panics
/// If this process has joined before.
pub fn run<T>(f: impl FnOnce(Ranks) -> T) -> T {
    let (jobs, asked) = channel();
    let (ready, joined) = channel();
    let talker = thread::spawn(move || {
        let universe = mpi::initialize_with_threading(Threading::Multiple);
        let (universe, _) = universe.expect("a process joins once");
        let world = universe.world();
        // who asked has ended if it does not hear
        let _ = ready.send((world.rank() as usize, world.size() as usize));
        let mut groups = vec![world];
        while let Ok(Job::Do(job)) = asked.recv() {
            job(&mut groups);
        }
        // groups are freed before MPI ends
        drop(groups);
        drop(universe);
    });
    let (rank, size) = joined.recv().expect("MPI says who is there, or ends the process");
    let before = Arc::new(take_hook());
    let hook = before.clone();
    let message = format!("rank {rank} of {size} panicked: all ranks end\n");
    set_hook(Box::new(move |panic: &PanicHookInfo| {
        hook(panic);
        // in one piece, as other ranks write too; nothing is left to do where it cannot be written
        let _ = std::io::stderr().write_all(message.as_bytes());
        SimpleCommunicator::world().abort(1)
    }));
    let result = f(Ranks::new(Arc::new(Processes { jobs: jobs.clone(), group: 0, rank, size })));
    // graphs that nobody went back through may hold ranks still: the talker does not wait for them
    let _ = jobs.send(Job::End);
    talker.join().expect("a panic ends the process");
    set_hook(Box::new(move |panic| before(panic)));
    result
}

/// What the thread that talks to MPI is asked.
enum Job {
    Do(Box<Work>),
    End,
}

/// Of all groups that there are so far.
type Work = dyn FnOnce(&mut Vec<SimpleCommunicator>) + Send;

/// A group of processes.
#[derive(Debug)]
struct Processes {
    jobs: Sender<Job>,
    /// Which of the groups that the talker knows.
    group: usize,
    rank: usize,
    size: usize,
}

impl Processes {
    /// Begins what `job` does in this group.
    fn ask<T: Send + 'static>(
        &self,
        job: impl FnOnce(&SimpleCommunicator) -> T + Send + 'static,
    ) -> Receiver<T> {
        let group = self.group;
        self.ask_all(move |groups| job(&groups[group]))
    }

    fn ask_all<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Vec<SimpleCommunicator>) -> T + Send + 'static,
    ) -> Receiver<T> {
        let (answer, receiver) = channel();
        let job = move |groups: &mut Vec<SimpleCommunicator>| {
            // who does not wait does not hear
            let _ = answer.send(job(groups));
        };
        self.jobs.send(Job::Do(Box::new(job))).expect(LEFT);
        receiver
    }
}

const LEFT: &str = "ranks are asked before this process leaves them";

/// MPI counts in 32 bits.
const MOST: usize = 1 << 30;

/// Lengths, and where each part begins.
///
/// # Panics
/// If the parts together have 2 GiB.
fn parts(lengths: &[usize]) -> (Vec<i32>, Vec<i32>) {
    let number = |length: usize| {
        i32::try_from(length).expect("what travels at once is less than 2 GiB: cut tokens into more chunks")
    };
    let mut begins = Vec::with_capacity(lengths.len());
    let mut begin = 0;
    for length in lengths {
        begins.push(number(begin));
        begin += length;
    }
    number(begin);
    (lengths.iter().map(|&length| number(length)).collect(), begins)
}

impl Collectives for Processes {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn exchange(&self, mut bytes: Vec<u8>, send: &[usize], receive: &[usize]) -> Pending {
        let length: usize = receive.iter().sum();
        let ((send, from), (receive, to)) = (parts(send), parts(receive));
        let answer = self.ask(move |group| {
            // without bytes a vector points to 1, by which Open MPI means something else
            bytes.push(0);
            let mut received = vec![0; length + 1];
            let bytes = Partition::new(bytes.as_slice(), send, from);
            let mut parts = PartitionMut::new(received.as_mut_slice(), receive, to);
            group.all_to_all_varcount_into(&bytes, &mut parts);
            received.truncate(length);
            received
        });
        Pending::new(move || answer.recv().expect(LEFT))
    }

    fn split(&self, color: usize) -> Arc<dyn Collectives> {
        let color = Color::with_value(i32::try_from(color).expect("a colour is a rank at most"));
        let group = self.group;
        let answer = self.ask_all(move |groups| {
            let split = groups[group].split_by_color(color).expect("who has a colour has a group");
            let (rank, size) = (split.rank() as usize, split.size() as usize);
            groups.push(split);
            (groups.len() - 1, rank, size)
        });
        let (group, rank, size) = answer.recv().expect(LEFT);
        Arc::new(Processes { jobs: self.jobs.clone(), group, rank, size })
    }

    fn all_reduce(&self, values: Vec<f32>) -> Vec<f32> {
        let answer = self.ask(move |group| {
            let mut sum = vec![0.0_f32; values.len()];
            for (values, sum) in values.chunks(MOST).zip(sum.chunks_mut(MOST)) {
                group.all_reduce_into(values, sum, SystemOperation::sum());
            }
            sum
        });
        answer.recv().expect(LEFT)
    }

    fn reduce(&self, values: Vec<f32>, root: usize) -> Option<Vec<f32>> {
        let is_root = self.rank == root;
        let answer = self.ask(move |group| {
            let root = group.process_at_rank(root as i32);
            let mut sum = vec![0.0_f32; if is_root { values.len() } else { 0 }];
            for (at, values) in values.chunks(MOST).enumerate() {
                match is_root {
                    true => {
                        let sum = &mut sum[at * MOST..][..values.len()];
                        root.reduce_into_root(values, sum, SystemOperation::sum());
                    }
                    false => root.reduce_into(values, SystemOperation::sum()),
                }
            }
            is_root.then_some(sum)
        });
        answer.recv().expect(LEFT)
    }

    fn broadcast(&self, mut bytes: Vec<u8>, root: usize) -> Vec<u8> {
        let answer = self.ask(move |group| {
            let root = group.process_at_rank(root as i32);
            for bytes in bytes.chunks_mut(MOST) {
                root.broadcast_into(bytes);
            }
            bytes
        });
        answer.recv().expect(LEFT)
    }

    fn barrier(&self) {
        self.ask(|group| group.barrier()).recv().expect(LEFT);
    }
}
